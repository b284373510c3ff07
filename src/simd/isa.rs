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
    /// AVX-512 F, BW, DQ, VL, VNNI and VBMI (Ice Lake, Zen 4 and newer).
    Avx512,
}

impl Isa {
    /// Every instruction set, simplest first.
    pub const ALL: [Isa; 3] = [Isa::Scalar, Isa::Avx2, Isa::Avx512];

    /// The name that `KVQ_ISA` takes.
    pub fn name(self) -> &'static str {
        match self {
            Isa::Scalar => "scalar",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
        }
    }

    #[cfg(target_arch = "x86_64")]
    fn available(self) -> bool {
        let avx2 =
            || is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
        match self {
            Isa::Scalar => true,
            Isa::Avx2 => avx2(),
            Isa::Avx512 => {
                avx2()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512vnni")
                    && is_x86_feature_detected!("avx512vbmi")
            }
        }
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn available(self) -> bool {
        self == Isa::Scalar
    }
}

/// Proof that the CPU has an instruction set: only detection makes one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IsaToken(Isa);

impl IsaToken {
    /// The token of an instruction set, if this CPU has it.
    pub fn new(isa: Isa) -> Option<IsaToken> {
        isa.available().then_some(IsaToken(isa))
    }

    /// Which instruction set.
    pub fn isa(self) -> Isa {
        self.0
    }

    /// What a table of kernels for `isa` asks for before it is handed out.
    ///
    /// # Panics
    ///
    /// If the token proves another instruction set.
    pub(crate) fn expect(self, isa: Isa) {
        assert_eq!(self.0, isa, "a proof of one instruction set is none of another");
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
            return Ok(Isa::ALL.iter().rev().find_map(|isa| IsaToken::new(*isa)).unwrap_or(IsaToken(Isa::Scalar)));
        };
        match Isa::ALL.iter().find(|isa| isa.name() == wanted) {
            None => fail(format!("KVQ_ISA={wanted}: use scalar, avx2 or avx512")),
            Some(isa) => match IsaToken::new(*isa) {
                Some(token) => Ok(token),
                None => fail(format!("KVQ_ISA={wanted}: this CPU does not have it")),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_opens_the_table_of_its_own_instruction_set_only() {
        for token in Isa::ALL.into_iter().filter_map(IsaToken::new) {
            for isa in Isa::ALL {
                let opened = std::panic::catch_unwind(|| token.expect(isa)).is_ok();
                assert_eq!(opened, token.isa() == isa, "{} for {}", token.isa().name(), isa.name());
            }
        }
    }

    #[test]
    #[cfg(target_arch = "x86_64")]
    #[should_panic(expected = "a proof of one instruction set")]
    fn a_scalar_token_opens_no_table_of_avx512() {
        let _ = crate::simd::avx512::kernels(IsaToken::new(Isa::Scalar).unwrap());
    }

    #[test]
    fn override_is_obeyed_or_refused() {
        assert_eq!(IsaToken::choose(Some("scalar")).unwrap().isa(), Isa::Scalar);
        assert!(IsaToken::choose(None).is_ok());
        let error = IsaToken::choose(Some("sse9")).unwrap_err();
        assert_eq!(error.message(), "KVQ_ISA=sse9: use scalar, avx2 or avx512");
    }
}
