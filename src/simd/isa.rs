//! Instruction sets: detection and the `KVQ_ISA` override.
#![forbid(unsafe_code)]

use once_cell::sync::OnceCell;

use crate::error::{Error, Result, Status};

/// A set of CPU features that kernels are written for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    /// Plain Rust.
    Scalar,
    /// AVX2, FMA and F16C.
    Avx2,
    /// These and AVX-VNNI (Alder Lake, Zen 5 and newer), which AVX-512 does not imply.
    AvxVnni,
    /// AVX-512 F, BW, DQ, VL, VNNI and VBMI (Ice Lake, Zen 4 and newer).
    Avx512,
    /// These and AMX with tiles of bytes (Sapphire Rapids and newer), which an operating system may refuse.
    Amx,
}

impl Isa {
    /// Every instruction set, simplest first.
    pub const ALL: [Isa; 5] = [Isa::Scalar, Isa::Avx2, Isa::AvxVnni, Isa::Avx512, Isa::Amx];

    /// The name that `KVQ_ISA` takes.
    pub fn name(self) -> &'static str {
        match self {
            Isa::Scalar => "scalar",
            Isa::Avx2 => "avx2",
            Isa::AvxVnni => "avxvnni",
            Isa::Avx512 => "avx512",
            Isa::Amx => "amx",
        }
    }
}

/// Proof that the CPU has AVX2, FMA and F16C, and with `VNNI` AVX-VNNI: only detection makes one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Avx2<const VNNI: bool = false>(());

/// Proof that the CPU has what [`Isa::AvxVnni`] lists.
pub type AvxVnni = Avx2<true>;

/// Proof that the CPU has what [`Isa::Avx512`] lists, and perhaps that this process may use AMX: only detection makes one. A mark
/// instead of a type of its own, since a single kernel asks for it and all others would be compiled twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Avx512 {
    has_amx: bool,
}

/// What tables of kernels hold of either kind.
#[cfg(target_arch = "x86_64")]
static AVX512: [Avx512; 2] = [Avx512 { has_amx: false }, Avx512 { has_amx: true }];

#[cfg(target_arch = "x86_64")]
impl Avx2 {
    fn detect() -> Option<Self> {
        (is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c"))
            .then_some(Avx2(()))
    }
}

#[cfg(target_arch = "x86_64")]
impl AvxVnni {
    fn detect() -> Option<Self> {
        Avx2::<false>::detect()?;
        is_x86_feature_detected!("avxvnni").then_some(Avx2(()))
    }
}

#[cfg(target_arch = "x86_64")]
impl Avx512 {
    /// Whether this process may use AMX.
    pub(crate) fn has_amx(self) -> bool {
        self.has_amx
    }

    /// The same proof for as long as the program runs.
    pub(crate) fn kept(self) -> &'static Self {
        &AVX512[usize::from(self.has_amx)]
    }

    fn detect_amx() -> Option<Self> {
        Avx512::detect()?;
        crate::simd::amx::is_permitted().then_some(Avx512 { has_amx: true })
    }

    fn detect() -> Option<Self> {
        Avx2::<false>::detect()?;
        (is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512vnni")
            && is_x86_feature_detected!("avx512vbmi"))
        .then_some(Avx512 { has_amx: false })
    }
}

#[cfg(not(target_arch = "x86_64"))]
impl<const VNNI: bool> Avx2<VNNI> {
    fn detect() -> Option<Self> {
        None
    }
}

#[cfg(not(target_arch = "x86_64"))]
impl Avx512 {
    fn detect() -> Option<Self> {
        None
    }

    fn detect_amx() -> Option<Self> {
        None
    }
}

/// An instruction set that this CPU has, with the proof that opens its tables of kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IsaToken {
    /// Every CPU has it.
    Scalar,
    /// [`Isa::Avx2`]
    Avx2(Avx2),
    /// [`Isa::AvxVnni`]
    AvxVnni(AvxVnni),
    /// [`Isa::Avx512`]
    Avx512(Avx512),
    /// [`Isa::Amx`]
    Amx(Avx512),
}

/// What has no proof to carry: plain Rust runs everywhere.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scalar;

/// The table of kernels for a token, out of what implements `$table` for all instruction sets: the one place that knows which
/// there are. The proof goes into the table, so that whoever has the table has the proof. Proofs without a size take no memory, the
/// others are kept once.
macro_rules! kernels_of {
    ($token:expr => $table:ty) => {{
        let table: &'static $table = match $token {
            #[cfg(target_arch = "x86_64")]
            $crate::simd::isa::IsaToken::Avx2(proof) => Box::leak(Box::new(proof)),
            #[cfg(target_arch = "x86_64")]
            $crate::simd::isa::IsaToken::AvxVnni(proof) => Box::leak(Box::new(proof)),
            #[cfg(target_arch = "x86_64")]
            $crate::simd::isa::IsaToken::Avx512(proof) | $crate::simd::isa::IsaToken::Amx(proof) => proof.kept(),
            _ => &$crate::simd::isa::Scalar,
        };
        table
    }};
}
pub(crate) use kernels_of;

impl IsaToken {
    /// The token of an instruction set, if this CPU has it.
    pub fn new(isa: Isa) -> Option<IsaToken> {
        match isa {
            Isa::Scalar => Some(IsaToken::Scalar),
            Isa::Avx2 => Avx2::<false>::detect().map(IsaToken::Avx2),
            Isa::AvxVnni => AvxVnni::detect().map(IsaToken::AvxVnni),
            Isa::Avx512 => Avx512::detect().map(IsaToken::Avx512),
            Isa::Amx => Avx512::detect_amx().map(IsaToken::Amx),
        }
    }

    /// Which instruction set.
    pub fn isa(self) -> Isa {
        match self {
            IsaToken::Scalar => Isa::Scalar,
            IsaToken::Avx2(_) => Isa::Avx2,
            IsaToken::AvxVnni(_) => Isa::AvxVnni,
            IsaToken::Avx512(_) => Isa::Avx512,
            IsaToken::Amx(_) => Isa::Amx,
        }
    }

    /// The best instruction set of this CPU, or the one that the environment variable `KVQ_ISA` names. Chosen once.
    ///
    /// # Errors
    ///
    /// [`Status::Unsupported`] if `KVQ_ISA` names something unknown or something this CPU does not have.
    pub fn detect() -> Result<IsaToken> {
        static CHOICE: OnceCell<Result<IsaToken>> = OnceCell::new();
        CHOICE.get_or_init(|| Self::choose(std::env::var("KVQ_ISA").ok().as_deref())).clone()
    }

    fn choose(wanted: Option<&str>) -> Result<IsaToken> {
        let fail = |text: String| Err(Error::new(Status::Unsupported, text));
        let Some(wanted) = wanted.filter(|w| !w.is_empty()) else {
            return Ok(Isa::ALL.iter().rev().find_map(|isa| IsaToken::new(*isa)).unwrap_or(IsaToken::Scalar));
        };
        match Isa::ALL.iter().find(|isa| isa.name() == wanted) {
            None => fail(format!("KVQ_ISA={wanted}: use scalar, avx2, avxvnni, avx512 or amx")),
            Some(isa) => match IsaToken::new(*isa) {
                Some(token) => Ok(token),
                None => fail(format!("KVQ_ISA={wanted}: this CPU or its operating system does not have it")),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_of_the_instruction_set_asked_for() {
        for isa in Isa::ALL {
            assert!(IsaToken::new(isa).is_none_or(|token| token.isa() == isa), "{}", isa.name());
        }
        assert!(IsaToken::new(Isa::Scalar).is_some());
    }

    #[test]
    fn every_name_chooses_its_set_or_says_that_it_is_missing() {
        for isa in Isa::ALL {
            match (IsaToken::new(isa), IsaToken::choose(Some(isa.name()))) {
                (Some(token), Ok(chosen)) => assert_eq!(token, chosen),
                (None, Err(error)) => {
                    assert_eq!(
                        error.message(),
                        format!("KVQ_ISA={}: this CPU or its operating system does not have it", isa.name())
                    );
                }
                (token, chosen) => panic!("{}: {token:?} {chosen:?}", isa.name()),
            }
        }
        let best = Isa::ALL.into_iter().filter_map(IsaToken::new).next_back();
        assert_eq!(IsaToken::choose(None).ok(), best);
    }

    #[test]
    fn override_is_obeyed_or_refused() {
        assert_eq!(IsaToken::choose(Some("scalar")).unwrap().isa(), Isa::Scalar);
        assert!(IsaToken::choose(None).is_ok());
        let error = IsaToken::choose(Some("sse9")).unwrap_err();
        assert_eq!(error.message(), "KVQ_ISA=sse9: use scalar, avx2, avxvnni, avx512 or amx");
    }
}
