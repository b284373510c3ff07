//! Single kernels for `src/bench`, which sees only what is public. Not an interface: nothing here is stable.
#![forbid(unsafe_code)]
#![allow(missing_docs)]

use std::sync::Arc;

use crate::codec::page::{PageCodec, PageRef, SealRows, Side};
use crate::codec::query::{Probabilities, Query};
use crate::codec::{CodecInfo, REGISTRY};
use crate::error::Result;
use crate::recipe::Recipe;
use crate::simd::exact::{ExactRows, Kernels, Logits, State};
use crate::simd::isa::IsaToken;
use crate::simd::kernels;

/// One side's codec with the buffers that its kernels need.
pub struct PageBench {
    codec: Arc<dyn PageCodec>,
    page: usize,
    query: Query,
    p: Probabilities,
}

impl PageBench {
    pub fn new(recipe: &Recipe, side: Side, head_dim: usize, token: IsaToken) -> Result<Self> {
        let params = if side == Side::Key { &recipe.key } else { &recipe.value };
        let codec = params.build(side, head_dim, recipe.page, token)?;
        Ok(Self { codec, page: recipe.page, query: Query::default(), p: Probabilities::default() })
    }

    pub fn page_bytes(&self) -> usize {
        self.codec.page_bytes()
    }

    /// The codec's row of the registry.
    pub fn info(&self) -> &'static CodecInfo {
        let format = self.codec.format();
        REGISTRY.iter().find(|row| format.starts_with(row.name)).expect("formats start with a name of the registry")
    }

    /// Seals a full page; `rows` is scratch afterwards.
    pub fn seal(&self, header: &mut [u8], bytes: &mut [u8], rows: &mut [f32]) {
        let at: Vec<u32> = (0..self.page as u32).collect();
        self.codec.seal(
            header,
            bytes,
            &mut SealRows {
                place: None,
                at: &at,
                rows,
                fresh: true,
                exact: &[],
                channel_weights: &[],
                last_exponents: &mut [],
                attention: &[],
            },
        );
    }

    /// Query rows for [`PageBench::scores`], `[n][head_dim]`.
    pub fn set_query(&mut self, rows: &[f32]) {
        self.codec.begin_query(rows, &mut self.query);
    }

    /// Weights for [`PageBench::accumulate`], `[n][page]`.
    pub fn set_weights(&mut self, p: &[f32]) {
        self.p.resize(p.len() / self.page, self.page);
        self.p.p[..p.len()].copy_from_slice(p);
    }

    pub fn scores(&mut self, header: &[u8], bytes: &[u8], out: &mut [f32]) {
        self.codec.scores(PageRef { header, bytes }, &mut self.query, out);
    }

    pub fn accumulate(&mut self, header: &[u8], bytes: &[u8], acc: &mut [f32]) {
        self.codec.accumulate(PageRef { header, bytes }, &mut self.p, acc);
    }
}

/// The kernels that do not depend on a codec, with a softmax state.
pub struct ExactBench {
    kernels: &'static dyn Kernels,
    state: State,
    slopes: Vec<f32>,
    mask_row: Vec<u32>,
}

impl ExactBench {
    /// For `n_rows` query rows and outputs of `dim` channels.
    pub fn new(token: IsaToken, n_rows: usize, dim: usize) -> Self {
        let mut state = State::default();
        state.reset(n_rows, dim, 0);
        Self { kernels: kernels(token), state, slopes: vec![1.0; n_rows], mask_row: vec![0; n_rows] }
    }

    pub fn scores(&self, q: &[f32], rows: &[f32], dim: usize, out: &mut [f32]) {
        let n = rows.len() / dim;
        self.kernels.exact_scores(q, ExactRows { data: rows, n, dim }, out, n);
    }

    pub fn accumulate(&self, p: &[f32], rows: &[f32], dim: usize, acc: &mut [f32]) {
        let n = rows.len() / dim;
        self.kernels.exact_accumulate(p, n, ExactRows { data: rows, n, dim }, acc);
    }

    /// Softmax without a mask of `scores`, `[n_rows][columns]`, in place.
    pub fn softmax(&mut self, scores: &mut [f32], columns: usize) {
        let logits =
            Logits { softcap: 0.0, slopes: &self.slopes, mask_row: &self.mask_row, mask: &[], mask_is_zero: true };
        self.kernels.softmax(scores, columns, &logits, &mut self.state);
    }
}
