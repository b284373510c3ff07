//! Instruction sets: detection, the `KVQ_ISA` override, and the one table of kernels that attention calls.

pub(crate) mod scalar;

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;

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

/// A block of exact rows `[n][dim]`, finite, with room behind them: `data` holds a multiple of 16 rows.
#[derive(Clone, Copy)]
pub(crate) struct ExactRows<'a> {
    pub(crate) data: &'a [f32],
    pub(crate) n: usize,
    pub(crate) dim: usize,
}

/// Running softmax state of the rows of one query tile: maximum, sum, and the two outputs that share them.
#[derive(Default, Debug)]
pub(crate) struct State {
    /// `[row]`
    pub(crate) max: Vec<f32>,
    /// `[row]`
    pub(crate) sum: Vec<f32>,
    /// `[row][head_dim_v]`, in the value codec's transformed space.
    pub(crate) packed: Vec<f32>,
    /// `[row][head_dim_v]`, from exact rows.
    pub(crate) exact: Vec<f32>,
}

/// How raw scores become logits.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Logits<'a> {
    /// `softcap * tanh(score / softcap)` if positive.
    pub(crate) softcap: f32,
    /// `[row]`: ALiBi slope that multiplies the mask; 1 without ALiBi.
    pub(crate) slopes: &'a [f32],
    /// `[row]`: which row of the mask block belongs to this row.
    pub(crate) mask_row: &'a [u32],
    /// `[mask row][columns]`, added to the scores; minus infinity hides.
    pub(crate) mask: &'a [f32],
    /// All mask values are zero; `mask` is not read.
    pub(crate) mask_is_zero: bool,
}

/// One row of the table of kernels that do not depend on a codec.
pub(crate) struct Kernels {
    /// `scores[row * columns + i] = <q[row], rows[i]>`, `q` being `[n_q][dim]`.
    pub(crate) exact_scores: fn(q: &[f32], rows: ExactRows, scores: &mut [f32], columns: usize),
    /// `acc[row * dim + c] += sum_i p[row * columns + i] * rows[i][c]`.
    pub(crate) exact_accumulate: fn(p: &[f32], columns: usize, rows: ExactRows, acc: &mut [f32]),
    /// Turns scores `[n_rows][columns]` into weights in place and updates the state.
    pub(crate) softmax: fn(scores: &mut [f32], columns: usize, logits: &Logits, state: &mut State),
    /// Little-endian half precision to single precision; what is not finite as [`finite`](crate::store::finite) says.
    pub(crate) f16_to_f32: fn(&[u8], &mut [f32]),
    /// Copies a row, with what is not finite as [`finite`](crate::store::finite) says.
    pub(crate) copy_finite: fn(&[f32], &mut [f32]),
}

/// The kernels of an instruction set.
pub(crate) fn kernels(token: IsaToken) -> &'static Kernels {
    match token.isa() {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => avx2::kernels(token),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => avx512::kernels(token),
        _ => &scalar::KERNELS,
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
        let _ = avx512::kernels(IsaToken::new(Isa::Scalar).unwrap());
    }

    #[test]
    fn override_is_obeyed_or_refused() {
        assert_eq!(IsaToken::choose(Some("scalar")).unwrap().isa(), Isa::Scalar);
        assert!(IsaToken::choose(None).is_ok());
        let error = IsaToken::choose(Some("sse9")).unwrap_err();
        assert_eq!(error.message(), "KVQ_ISA=sse9: use scalar, avx2 or avx512");
    }
}
