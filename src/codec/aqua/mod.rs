//! Codec `aqua`: keys as codec `channel` codes them, in a frame that calibration has made for them, and of each token whether
//! its value is predicted from its key.
//!
//! Source: AQUA-KV (arXiv 2501.19392) for prediction and residuals; that chain of layers is rebuilt for every token, so here
//! a value is predicted from the key of the same token and head, whose codes attention reads anyway. In the frame of a page
//! (`frame.rs`) nothing depends on where the page is.
//!
//! A page of tokens whose positions do not follow its rows (several sequences, holes that were filled) is coded in the same
//! way with the position that most of its rows agree on; the bias is taken off only where half of them do. Whatever is
//! chosen, what is decoded is what was coded: it costs bits, never correctness.
#![deny(unsafe_code)]

mod curves;
mod device;
mod frame;
mod kernels;
mod predict;
mod scalar;
mod vector;
mod words;

#[cfg(test)]
mod tests;

use std::sync::Arc;

use super::channel::scalar::least_error;
use super::channel::{ChannelCodec, ChannelParams};
use super::float8::{e4m3_decode, e4m3_encode, inverse_power, power};
use super::mixed::{MAX_BITS, SEGMENT};
use super::page::{PageCodec, PageRef, SealRows, ValuePredictor};
use super::quantizer::mean_row;
use super::query::{Probabilities, Query};
use crate::cuda::desc::{SideDesc, CODEC_AQUA};
use crate::error::{Error, Result, Status};
use crate::profile::Profile;
use crate::shape::{Shape, MAX_HEAD_DIM};
use crate::simd::isa::{kernels_of, IsaToken};
use frame::{Frame, Place};
use kernels::Kernels;

/// Raised whenever the same rows would seal to other bytes, or the same bytes would mean other rows.
pub const FORMAT_VERSION: u32 = 1;

const MAX_DIM: usize = MAX_HEAD_DIM as usize;

/// Where the tail's parts are.
const FIRST: std::ops::Range<usize> = 0..4;
const HEAD: std::ops::Range<usize> = 4..6;
const FLAGS: usize = 6;
const SEGMENTS: usize = 7;
const GATES: usize = 8;
/// Flag: the bias has been taken off.
const BIASED: u8 = 1;

/// Parameters of the keys of an `aqua` recipe.
#[derive(Clone, Debug, PartialEq)]
pub struct AquaParams {
    /// How coefficients are coded.
    pub channel: ChannelParams,
    /// Take the key bias off.
    pub bias: bool,
    /// Code coefficients that are independent of each other (KLT) instead of channels.
    pub klt: bool,
    /// Predict values.
    pub predict: bool,
    /// The profile as it was named; empty: not at all.
    pub path: String,
    /// The profile, once it has been read.
    pub profile: Option<Profile>,
}

impl AquaParams {
    /// Fails unless there is a profile to read.
    pub(crate) fn check_named(&self) -> Result<()> {
        if !self.path.is_empty() {
            return Ok(());
        }
        let text = "aqua needs profile=FILE: llama-kvq-calibrate -m MODEL.gguf -f TEXT -o FILE makes one";
        Err(Error::new(Status::Recipe, text))
    }
}

/// The codec for the keys of one layer.
///
/// # Page layout
///
/// A page of [`ChannelCodec`], whose channels are the first so many coefficients, in segments of 16: those that calibration
/// found to matter most. They have all the bits; of the others (the last segment at least) a page has the mean alone, E4M3 with
/// the base of the mid-points, behind the channels' numbers. Then a tail:
///
/// | bytes | |
/// |---|---|
/// | 4 | i32: the position of row 0, or where it would be |
/// | 2 | u16: the KV head |
/// | 1 | bit 0: the bias has been taken off |
/// | 1 | number of segments that are coded |
/// | `page / 8` | a bit per row: its value is predicted, and the value page holds the rest |
///
/// padded to 64 bytes.
#[derive(Clone, Debug)]
pub struct AquaCodec {
    params: AquaParams,
    /// By the number of segments that they code, ascending.
    inners: Vec<ChannelCodec>,
    frame: Arc<Frame>,
    page: usize,
    token: IsaToken,
    kernels: &'static dyn Kernels,
}

impl AquaCodec {
    /// The codec without a profile, which knows how large pages are.
    pub(super) fn unprofiled(params: &AquaParams, head_dim: usize, page: usize, token: IsaToken) -> Result<Self> {
        Self::with_frame(params, Frame::identity(head_dim, page), page, token)
    }

    /// The codec for a layer.
    ///
    /// # Errors
    ///
    /// [`Status::Recipe`] without a profile or if a page cannot hold that many bits; [`Status::Format`] if the profile is not of
    /// this layer.
    pub(crate) fn new(params: &AquaParams, layer: usize, shape: Shape, page: usize, token: IsaToken) -> Result<Self> {
        let Some(profile) = &params.profile else {
            params.check_named()?;
            return Err(Error::new(Status::Recipe, "the profile has not been read: kvq_recipe_with_profile takes it"));
        };
        Self::with_frame(params, Frame::new(profile.layer(layer, shape)?, params, page)?, page, token)
    }

    fn with_frame(params: &AquaParams, frame: Frame, page: usize, token: IsaToken) -> Result<Self> {
        let whole = ChannelCodec::new(&params.channel, frame.dim_k, page, token)?;
        let (n, budget) = (whole.tile.n_segments(), whole.tile.budget());
        // Channels as they are matter all.
        let fewest = if params.klt { budget.div_ceil(MAX_BITS) } else { n };
        let most = if params.klt { fewest.max((n - 1).min(budget)) } else { n };
        let inner = |n| ChannelCodec::with_budget(&params.channel, n * SEGMENT, page, budget, token);
        let inners = (fewest..=most).map(inner).collect();
        let kernels = kernels_of!(token => dyn Kernels);
        Ok(Self { params: params.clone(), inners, frame: Arc::new(frame), page, token, kernels })
    }

    /// How the keys of a page are coded.
    fn inner(&self, place: Place) -> &ChannelCodec {
        let fewest = self.inners[0].head_dim / SEGMENT;
        &self.inners[place.segments.saturating_sub(fewest).min(self.inners.len() - 1)]
    }

    /// Where the tail of a page is.
    fn tail_offset(&self) -> usize {
        let bytes = |inner: &ChannelCodec| inner.used_bytes() + self.frame.dim_k - inner.head_dim;
        self.inners.iter().map(bytes).fold(0, usize::max)
    }

    /// The means of the coefficients that a page does not code, into `out[head_dim]`.
    fn read_means(&self, page: PageRef, place: Place, out: &mut [f32]) {
        let inner = self.inner(place);
        let scale = power(page.header[1]);
        let bytes = &page.bytes[inner.used_bytes()..][..out.len() - inner.head_dim];
        out[inner.head_dim..].iter_mut().zip(bytes).for_each(|(out, byte)| *out = e4m3_decode(*byte) * scale);
    }

    fn tail<'a>(&self, bytes: &'a [u8]) -> &'a [u8] {
        &bytes[self.tail_offset()..]
    }

    fn place(&self, bytes: &[u8]) -> Place {
        let tail = self.tail(bytes);
        Place {
            first: i32::from_le_bytes([tail[0], tail[1], tail[2], tail[3]]),
            head: usize::from(u16::from_le_bytes([tail[4], tail[5]])),
            biased: tail[FLAGS] & BIASED != 0,
            segments: usize::from(tail[SEGMENTS]),
        }
    }

    /// The place of a page that is made anew.
    fn choose_place(&self, bytes: &[u8], rows: &SealRows) -> Place {
        let old = self.place(bytes);
        let Some(given) = &rows.place else { return Place { biased: false, ..old } };
        // Where row 0 would be, as each row has it.
        let mut first: Vec<i32> =
            given.positions.iter().zip(rows.at).map(|(pos, at)| pos.wrapping_sub(*at as i32)).collect();
        first.sort_unstable();
        let runs = first.chunk_by(|a, b| a == b);
        let most = runs.max_by_key(|run| run.len()).map_or((0, 0), |run| (run[0], run.len()));
        Place { first: most.0, head: given.head, biased: 2 * most.1 >= first.len(), segments: 0 }
    }

    /// How many segments are coded with the least error, given `[n][head_dim]` coefficients.
    fn choose_segments(&self, coefficients: &[f32]) -> usize {
        let dim = self.frame.dim_k;
        let (mut mean, mut weight) = (vec![0f32; dim], vec![0f32; dim]);
        mean_row(coefficients, &mut mean);
        for row in coefficients.chunks_exact(dim) {
            weight.iter_mut().zip(row.iter().zip(&mean)).for_each(|(w, (x, mean))| *w += (x - mean) * (x - mean));
        }
        let error = |inner: &ChannelCodec| {
            let (coded, rest) = weight.split_at(inner.head_dim);
            least_error(inner, coded) + rest.iter().sum::<f32>()
        };
        let best = self.inners.iter().map(|inner| (error(inner), inner.head_dim / SEGMENT));
        best.min_by(|a, b| a.0.total_cmp(&b.0)).map_or(0, |best| best.1)
    }

    /// A bit per row: its value is predicted.
    fn gates<'a>(&self, bytes: &'a [u8]) -> &'a [u8] {
        &self.tail(bytes)[GATES..][..self.page / 8]
    }

    fn gate(&self, bytes: &[u8], row: usize) -> bool {
        self.gates(bytes)[row / 8] >> (row % 8) & 1 == 1
    }

    fn set_gate(&self, bytes: &mut [u8], row: usize, gate: bool) {
        let byte = &mut bytes[self.tail_offset() + GATES + row / 8];
        *byte = *byte & !(1 << (row % 8)) | u8::from(gate) << (row % 8);
    }

    /// The decoded key of a row in the frame of its page, without the bias.
    pub(crate) fn framed_key(&self, page: PageRef, row: usize, out: &mut [f32]) {
        self.coefficients(page, row, out);
        self.frame.untransform(self.place(page.bytes), out);
    }

    /// What a row's key is coded as, decoded.
    fn coefficients(&self, page: PageRef, row: usize, out: &mut [f32]) {
        let place = self.place(page.bytes);
        self.inner(place).decode(page, row, out);
        self.read_means(page, place, out);
    }
}

impl PageCodec for AquaCodec {
    fn format(&self) -> String {
        let AquaParams { bias, klt, predict, .. } = self.params;
        format!("aqua/{FORMAT_VERSION}:{},{bias},{klt},{predict},{:08x}", self.inners[0].format(), self.frame.hash)
    }

    fn page_bytes(&self) -> usize {
        (self.tail_offset() + GATES + self.page / 8).next_multiple_of(64)
    }

    fn seal(&self, header: &mut [u8], page: &mut [u8], rows: &mut SealRows) {
        let mut place = if rows.fresh { self.choose_place(page, rows) } else { self.place(page) };
        let dim = self.frame.dim_k;
        self.kernels.enter(self, place, rows.at, rows.rows);
        if rows.fresh {
            place.segments = self.choose_segments(rows.rows);
            page.fill(0);
            let tail = &mut page[self.tail_offset()..];
            tail[FIRST].copy_from_slice(&place.first.to_le_bytes());
            tail[HEAD].copy_from_slice(&(place.head as u16).to_le_bytes());
            tail[FLAGS] = if place.biased { BIASED } else { 0 };
            tail[SEGMENTS] = place.segments as u8;
        }
        rows.at.iter().for_each(|&row| self.set_gate(page, row as usize, false));
        let inner = self.inner(place);
        let mut coded: Vec<f32> = rows.rows.chunks_exact(dim).flat_map(|row| &row[..inner.head_dim]).copied().collect();
        let (body, rest) = page.split_at_mut(inner.used_bytes());
        // Errors of coefficients matter alike.
        let [channel_weights, attention]: [&[f32]; 2] = [&[], &[]];
        let SealRows { at, fresh, exact, .. } = *rows;
        let last_exponents = &mut [];
        let mut inner_rows =
            SealRows { place: None, at, rows: &mut coded, fresh, exact, channel_weights, last_exponents, attention };
        inner.seal(header, body, &mut inner_rows);
        if fresh {
            let mut mean = [0f32; MAX_DIM];
            mean_row(rows.rows, &mut mean[..dim]);
            let means = rest.iter_mut().zip(&mean[inner.head_dim..dim]);
            means.for_each(|(byte, mean)| *byte = e4m3_encode(mean * inverse_power(header[1])));
        }
    }

    fn decode(&self, page: PageRef, row: usize, out: &mut [f32]) {
        let place = self.place(page.bytes);
        self.coefficients(page, row, out);
        self.frame.leave(place, &self.frame.angles(place), row, out);
    }

    fn begin_query(&self, rows: &[f32], query: &mut Query) {
        query.framed.rows.clear();
        query.framed.rows.extend_from_slice(rows);
    }

    fn scores(&self, page: PageRef, query: &mut Query, scores: &mut [f32]) {
        self.kernels.scores(self, page, query, scores);
    }

    fn accumulate(&self, _page: PageRef, _p: &mut Probabilities, _acc: &mut [f32]) {
        unreachable!("recipes use this codec for keys only");
    }

    fn untransform(&self, _row: &mut [f32]) {}

    fn wants_places(&self) -> bool {
        true
    }

    fn predictor(&self) -> Option<&dyn ValuePredictor> {
        self.frame.predicts().then_some(self)
    }

    /// That of the largest number of segments.
    fn describe(&self, desc: &mut SideDesc) {
        let (first, last) = (&self.inners[0], &self.inners[self.inners.len() - 1]);
        last.describe(desc);
        desc.codec = CODEC_AQUA;
        (desc.fewest_segments, desc.tail) = (first.tile.n_segments() as u32, self.tail_offset() as u32);
    }

    fn profile(&self) -> Vec<u8> {
        self.frame.for_device()
    }
}
