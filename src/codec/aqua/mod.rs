//! Codec `aqua`: keys as codec `channel` codes them, in a frame that calibration has made for them, and of each token whether
//! its value is predicted from its key.
//!
//! Source: AQUA-KV (arXiv 2501.19392) for prediction and residuals; that chain of layers is rebuilt for every token, so here
//! a value is predicted from the key of the same token and head, whose codes attention reads anyway. In the frame of a page
//! ([`frame`]) nothing depends on where the page is.
//!
//! A page of tokens whose positions do not follow its rows (several sequences, holes that were filled) is coded in the same
//! way with the position that most of its rows agree on; the bias is taken off only where half of them do. Whatever is
//! chosen, what is decoded is what was coded: it costs bits, never correctness.
#![forbid(unsafe_code)]

mod frame;
mod predict;

#[cfg(test)]
mod tests;

use std::sync::Arc;

use super::channel::{ChannelCodec, ChannelParams};
use super::page::{PageCodec, PageRef, SealRows, ValuePredictor};
use super::query::{Probabilities, Query};
use crate::cuda::desc::SideDesc;
use crate::error::{Error, Result, Status};
use crate::profile::Profile;
use crate::shape::Shape;
use crate::simd::isa::IsaToken;
use frame::{Frame, Place};

/// Raised whenever the same rows would seal to other bytes, or the same bytes would mean other rows.
pub const FORMAT_VERSION: u32 = 1;

/// Bytes behind the coded keys.
const TAIL_BYTES: usize = 64;
/// Where the tail's parts are.
const FIRST: std::ops::Range<usize> = 0..4;
const HEAD: std::ops::Range<usize> = 4..6;
const FLAGS: usize = 6;
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
/// A page of [`ChannelCodec`], whose channels are the coefficients, and behind it a tail:
///
/// | bytes | |
/// |---|---|
/// | 4 | i32: the position of row 0, or where it would be |
/// | 2 | u16: the KV head |
/// | 1 | bit 0: the bias has been taken off |
/// | 1 | zero |
/// | 32 | a bit per row: its value is predicted, and the value page holds the rest |
/// | 24 | zero |
#[derive(Clone, Debug)]
pub struct AquaCodec {
    params: AquaParams,
    inner: ChannelCodec,
    frame: Arc<Frame>,
    page: usize,
}

impl AquaCodec {
    /// The codec without a profile, which knows how large pages are.
    pub(super) fn unprofiled(params: &AquaParams, head_dim: usize, page: usize, token: IsaToken) -> Result<Self> {
        Self::with_frame(params, Frame::identity(head_dim), page, token)
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
        let inner = ChannelCodec::new(&params.channel, frame.dim_k, page, token)?;
        Ok(Self { params: params.clone(), inner, frame: Arc::new(frame), page })
    }

    /// The coded keys of a page.
    fn body<'a>(&self, page: PageRef<'a>) -> PageRef<'a> {
        PageRef { header: page.header, bytes: &page.bytes[..self.inner.page_bytes()] }
    }

    fn tail<'a>(&self, bytes: &'a [u8]) -> &'a [u8] {
        &bytes[self.inner.page_bytes()..]
    }

    fn place(&self, bytes: &[u8]) -> Place {
        let tail = self.tail(bytes);
        Place {
            first: i32::from_le_bytes([tail[0], tail[1], tail[2], tail[3]]),
            head: usize::from(u16::from_le_bytes([tail[4], tail[5]])),
            biased: tail[FLAGS] & BIASED != 0,
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
        Place { first: most.0, head: given.head, biased: 2 * most.1 >= first.len() }
    }

    fn gate(&self, bytes: &[u8], row: usize) -> bool {
        self.tail(bytes)[GATES + row / 8] >> (row % 8) & 1 == 1
    }

    fn set_gate(&self, bytes: &mut [u8], row: usize, gate: bool) {
        let byte = &mut bytes[self.inner.page_bytes() + GATES + row / 8];
        *byte = *byte & !(1 << (row % 8)) | u8::from(gate) << (row % 8);
    }

    /// The decoded key of a row in the frame of its page, without the bias.
    pub(crate) fn framed_key(&self, page: PageRef, row: usize, out: &mut [f32]) {
        self.coefficients(page, row, out);
        self.frame.untransform(self.place(page.bytes), out);
    }

    /// What a row's key is coded as, decoded.
    fn coefficients(&self, page: PageRef, row: usize, out: &mut [f32]) {
        self.inner.decode(self.body(page), row, out);
    }
}

impl PageCodec for AquaCodec {
    fn format(&self) -> String {
        let AquaParams { bias, klt, predict, .. } = self.params;
        format!("aqua/{FORMAT_VERSION}:{},{bias},{klt},{predict},{:08x}", self.inner.format(), self.frame.hash)
    }

    fn page_bytes(&self) -> usize {
        self.inner.page_bytes() + TAIL_BYTES
    }

    fn seal(&self, header: &mut [u8], page: &mut [u8], rows: &mut SealRows) {
        let place = if rows.fresh { self.choose_place(page, rows) } else { self.place(page) };
        if rows.fresh {
            let tail = &mut page[self.inner.page_bytes()..];
            tail.fill(0);
            tail[FIRST].copy_from_slice(&place.first.to_le_bytes());
            tail[HEAD].copy_from_slice(&(place.head as u16).to_le_bytes());
            tail[FLAGS] = if place.biased { BIASED } else { 0 };
        }
        let angles = self.frame.angles(place);
        for (&at, key) in rows.at.iter().zip(rows.rows.chunks_exact_mut(self.frame.dim_k)) {
            self.frame.enter(place, &angles, at as usize, key);
            self.set_gate(page, at as usize, false);
        }
        let (body, _) = page.split_at_mut(self.inner.page_bytes());
        // Errors of coefficients matter alike.
        let [channel_weights, attention]: [&[f32]; 2] = [&[], &[]];
        let SealRows { at, fresh, exact, .. } = *rows;
        let rows = &mut *rows.rows;
        let last_exponents = &mut [];
        let mut rows = SealRows { place: None, at, rows, fresh, exact, channel_weights, last_exponents, attention };
        self.inner.seal(header, body, &mut rows);
    }

    fn decode(&self, page: PageRef, row: usize, out: &mut [f32]) {
        let place = self.place(page.bytes);
        self.coefficients(page, row, out);
        self.frame.leave(place, &self.frame.angles(place), row, out);
    }

    fn begin_query(&self, rows: &[f32], query: &mut Query) {
        query.framed.rows.clear();
        query.framed.rows.extend_from_slice(rows);
        query.framed.place = None;
    }

    fn scores(&self, page: PageRef, query: &mut Query, scores: &mut [f32]) {
        let (place, dim) = (self.place(page.bytes), self.frame.dim_k);
        if query.framed.place != Some((place.first, place.head)) {
            query.framed.place = Some((place.first, place.head));
            query.framed.turned.clone_from(&query.framed.rows);
            let mut coefficients = std::mem::take(&mut query.framed.coefficients);
            self.frame.enter_queries(place, &mut query.framed.turned, &mut coefficients);
            self.inner.begin_query(&coefficients, query);
            query.framed.coefficients = coefficients;
        }
        self.inner.scores(self.body(page), query, scores);
        let bias = &self.frame.head(place).bias;
        if place.biased && !bias.is_empty() {
            for (q, scores) in query.framed.turned.chunks_exact(dim).zip(scores.chunks_exact_mut(self.page)) {
                let rows = scores.iter_mut().zip(bias.chunks_exact(dim));
                rows.for_each(|(score, bias)| *score += super::quantizer::dot(q, bias));
            }
        }
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

    /// No kernel on a GPU reads this: no codec is named.
    fn describe(&self, desc: &mut SideDesc) {
        (desc.codec, desc.page_bytes) = (u32::MAX, self.page_bytes() as u32);
    }
}
