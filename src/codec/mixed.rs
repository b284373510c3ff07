//! A tile whose depth is ordered by width: what codecs with adaptive widths use.
//!
//! As in [`super::tile`], a tile is `lanes` by `depth` codes and the depth is what a dot product sums over. Here the
//! depth is cut into segments of [`SEGMENT`] codes, each with a width of 1 to 4 bits of its own, widest first. Because
//! the bits of a lane always add up to the same budget, a page has a fixed size whatever the widths.
#![deny(unsafe_code)]

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod lanes_avx2;
#[cfg(target_arch = "x86_64")]
mod lanes_avx512;
pub(crate) mod many;
pub(crate) mod vector;

use super::quantizer::{self, Quantizer};
use super::tile::{LANE_BLOCK, QUAD};
use crate::codec::page::MAX_PAGE;
use crate::cuda::desc::SideDesc;
use crate::shape::MAX_HEAD_DIM;

/// Codes of consecutive depth that share a width: one word of 2-bit fields.
pub const SEGMENT: usize = 16;
/// Largest depth: channels of a head or tokens of a page.
pub(crate) const MAX_DEPTH: usize = if MAX_PAGE > MAX_HEAD_DIM as usize { MAX_PAGE } else { MAX_HEAD_DIM as usize };
/// Widest code.
pub const MAX_BITS: usize = 4;

/// Quads of a segment.
pub(crate) const SEGMENT_QUADS: usize = SEGMENT / QUAD;

/// See [`super::CodecInfo::nmse`]; of all codecs that use these tiles.
pub(crate) const NMSE: f64 = 1e-3;

/// Squared error of the best uniform quantizer of 0 to 4 bits for a Gaussian of unit variance (Max 1960).
pub(crate) const DISTORTION: [f32; MAX_BITS + 1] = [1.0, 0.3634, 0.1188, 0.03744, 0.01154];

/// The code value, between two codes, that stands for the middle of the range.
#[inline(always)]
pub(crate) fn centre(bits: usize) -> f32 {
    ((1 << bits) - 1) as f32 * 0.5
}

/// The split of a budget (sum of the widths) over segments of `segment` places that leaves the least error, given the
/// weight of each place, which falls. No width is below `floor`, which the budget must allow.
pub(crate) fn share_out(weight: &[f32], segment: usize, budget: usize, floor: usize) -> Segments {
    let n = weight.len() / segment;
    let mut below = [0f32; 17];
    for (s, weight) in weight.chunks_exact(segment).enumerate() {
        below[s + 1] = below[s] + weight.iter().sum::<f32>();
    }
    let mut best = (f32::INFINITY, Segments::uniform(floor, n));
    for four in 0..=n {
        for three in 0..=n - four {
            let Some(segments) = Segments::complete(four, three, n, budget) else { continue };
            if segments.0[MAX_BITS + 1 - floor..].iter().any(|count| *count > 0) {
                continue;
            }
            let (mut first, mut error) = (0, 0.0);
            for (count, bits) in segments.0.into_iter().zip((1..=MAX_BITS).rev()) {
                error += DISTORTION[bits] * (below[first + count] - below[first]);
                first += count;
            }
            if error < best.0 || best.0 == f32::INFINITY {
                best = (error, segments);
            }
        }
    }
    best.1
}

/// How many segments have 4, 3, 2 and 1 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segments(pub [usize; MAX_BITS]);

impl Segments {
    /// All `n` segments with `bits` bits.
    pub fn uniform(bits: usize, n: usize) -> Self {
        let mut counts = [0; MAX_BITS];
        counts[MAX_BITS - bits] = n;
        Segments(counts)
    }

    /// The counts that `n` segments and a budget of `budget` bits (summed over segments) leave when `four` of them have
    /// 4 bits and `three` have 3; `None` if that is impossible.
    pub fn complete(four: usize, three: usize, n: usize, budget: usize) -> Option<Self> {
        let rest = n.checked_sub(four + three)?;
        let bits = budget.checked_sub(4 * four + 3 * three)?;
        let two = bits.checked_sub(rest)?;
        Some(Segments([four, three, two, rest.checked_sub(two)?]))
    }

    /// Width of segment `index`.
    pub fn bits(&self, index: usize) -> usize {
        let [four, three, two, _] = self.0;
        match index {
            i if i < four => 4,
            i if i < four + three => 3,
            i if i < four + three + two => 2,
            _ => 1,
        }
    }
}

/// Geometry of a mixed tile.
///
/// # Layout
///
/// Quads, words and lane blocks are those of [`super::tile::Tile`]. The words of a lane block are, in this order:
///
/// | words | content |
/// |---|---|
/// | 2 per segment of 4 bits | two quads a word, bits `4 (q % 2)` and up |
/// | 1 per segment of 3 or 2 bits | four quads a word, bits `2 (q % 4)` and up: the code, or its low two bits |
/// | 1 per two segments of 3 or 1 bits | eight quads a word, bit `q % 8`: bit 2 of 3-bit codes, then the 1-bit codes |
///
/// An even budget makes the segments of odd width an even number, so the last kind of word is always full.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MixedTile {
    lanes: usize,
    depth: usize,
    budget: usize,
}

impl MixedTile {
    /// A tile of `lanes` (a multiple of 32) by `depth` (a multiple of 16) codes; `budget` is the sum of the segments'
    /// widths and must be even.
    pub fn new(lanes: usize, depth: usize, budget: usize) -> Self {
        assert!(lanes > 0 && lanes.is_multiple_of(LANE_BLOCK) && depth > 0 && depth.is_multiple_of(SEGMENT));
        let n = depth / SEGMENT;
        assert!(budget.is_multiple_of(2) && (n..=MAX_BITS * n).contains(&budget));
        Self { lanes, depth, budget }
    }

    /// Segments along the depth.
    pub fn n_segments(&self) -> usize {
        self.depth / SEGMENT
    }

    /// Sum of the segments' widths.
    pub fn budget(&self) -> usize {
        self.budget
    }

    /// Bytes of one block of 32 lanes.
    pub fn block_bytes(&self) -> usize {
        self.budget / 2 * LANE_BLOCK * 4
    }

    /// Bytes of the tile, a multiple of 64.
    pub fn bytes(&self) -> usize {
        self.lanes / LANE_BLOCK * self.block_bytes()
    }

    fn byte(&self, lane: usize, word: usize, depth: usize) -> usize {
        lane / LANE_BLOCK * self.block_bytes() + (word * LANE_BLOCK + lane % LANE_BLOCK) * 4 + depth % QUAD
    }

    /// The fields of one code: byte, shift, bits, and the shift of their value inside the code.
    fn fields(&self, segments: &Segments, lane: usize, depth: usize) -> [(usize, usize, usize, usize); 2] {
        let [four, three, two, _] = segments.0;
        let (segment, quad) = (depth / SEGMENT, depth % SEGMENT / QUAD);
        let single = |odd: usize| {
            let plane = 2 * four + three + two + odd / 2;
            (self.byte(lane, plane, depth), odd % 2 * SEGMENT_QUADS + quad, 1)
        };
        let bits = segments.bits(segment);
        if bits == 4 {
            return [(self.byte(lane, 2 * segment + quad / 2, depth), quad % 2 * 4, 4, 0), (0, 0, 0, 0)];
        }
        if bits == 1 {
            let (byte, shift, bits) = single(three + segment - four - three - two);
            return [(byte, shift, bits, 0), (0, 0, 0, 0)];
        }
        let low = (self.byte(lane, four + segment, depth), quad * 2, 2, 0);
        if bits == 2 {
            return [low, (0, 0, 0, 0)];
        }
        let (byte, shift, bits) = single(segment - four);
        [low, (byte, shift, bits, 2)]
    }

    /// Reads one code.
    pub fn get(&self, bytes: &[u8], segments: &Segments, lane: usize, depth: usize) -> u8 {
        self.fields(segments, lane, depth).iter().fold(0, |code, &(byte, shift, bits, weight)| {
            code | (bytes[byte] >> shift & ((1u16 << bits) - 1) as u8) << weight
        })
    }

    /// Writes one code, leaving all others as they are.
    pub fn set(&self, bytes: &mut [u8], segments: &Segments, lane: usize, depth: usize, code: u8) {
        for (byte, shift, bits, weight) in self.fields(segments, lane, depth) {
            let mask = ((1u16 << bits) - 1) as u8;
            bytes[byte] = bytes[byte] & !(mask << shift) | (code >> weight & mask) << shift;
        }
    }

    /// Writes the code at `depth` of every lane, `codes[lanes]`. Equal to [`MixedTile::set`] for each, several times faster.
    #[inline(always)]
    pub fn set_depth(&self, bytes: &mut [u8], segments: &Segments, depth: usize, codes: &[u8]) {
        for (byte, shift, bits, weight) in self.fields(segments, 0, depth).into_iter().filter(|field| field.2 > 0) {
            let mask = ((1u16 << bits) - 1) as u8;
            for (lane, code) in codes.iter().enumerate() {
                let at = byte + self.byte(lane, 0, 0);
                bytes[at] = bytes[at] & !(mask << shift) | (code >> weight & mask) << shift;
            }
        }
    }

    /// Reads the code at `depth` of every lane, `codes[lanes]`. Equal to [`MixedTile::get`] for each, several times faster.
    #[inline(always)]
    pub fn get_depth(&self, bytes: &[u8], segments: &Segments, depth: usize, codes: &mut [u8]) {
        codes.fill(0);
        for (byte, shift, bits, weight) in self.fields(segments, 0, depth).into_iter().filter(|field| field.2 > 0) {
            let mask = ((1u16 << bits) - 1) as u8;
            for (block, codes) in codes.chunks_mut(LANE_BLOCK).enumerate() {
                let bytes = &bytes[byte + block * self.block_bytes()..];
                for (lane, code) in codes.iter_mut().enumerate() {
                    *code |= (bytes[lane * QUAD] >> shift & mask) << weight;
                }
            }
        }
    }

    /// Writes all codes of one lane, `codes[depth]`. Equal to [`MixedTile::set`] for each, many times faster.
    #[inline(always)]
    pub fn set_lane(&self, bytes: &mut [u8], segments: &Segments, lane: usize, codes: &[u8]) {
        let [four, three, two, one] = segments.0;
        let quad = |segment: usize, quad: usize| {
            let c = &codes[segment * SEGMENT + quad * QUAD..][..QUAD];
            u32::from_le_bytes([c[0], c[1], c[2], c[3]])
        };
        let mut put = |word: usize, value: u32| {
            let at = self.byte(lane, word, 0);
            bytes[at..at + QUAD].copy_from_slice(&value.to_le_bytes());
        };
        for segment in 0..four {
            put(2 * segment, quad(segment, 0) | quad(segment, 1) << 4);
            put(2 * segment + 1, quad(segment, 2) | quad(segment, 3) << 4);
        }
        for segment in four..four + three + two {
            let low = |q: usize| (quad(segment, q) & 0x0303_0303) << (2 * q);
            put(four + segment, low(0) | low(1) | low(2) | low(3));
        }
        let plane = 2 * four + three + two;
        let odd = |i: usize| if i < three { (four + i, 2) } else { (four + two + i, 0) };
        for pair in 0..(three + one) / 2 {
            let word = (0..2).fold(0, |word, half| {
                let (segment, shift) = odd(2 * pair + half);
                (0..SEGMENT_QUADS).fold(word, |word, q| {
                    word | (quad(segment, q) >> shift & 0x0101_0101) << (half * SEGMENT_QUADS + q)
                })
            });
            put(plane + pair, word);
        }
    }
}

/// A tile with what its codes stand for: `factor[d] * (code - centre) + mid[d]` at place `d` of the depth, which belongs to
/// entry `order[d]` of a row of coefficients.
pub(crate) struct MixedPage<'a> {
    pub(crate) tile: &'a MixedTile,
    pub(crate) segments: Segments,
    pub(crate) codes: &'a [u8],
    /// Bytes of the whole page.
    pub(crate) page_bytes: usize,
    /// Codes stand for [`NORMAL_LEVELS`] with their middle at [`NORMAL_CENTRE`] instead of for themselves.
    pub(crate) normal: bool,
    /// Empty: the depth is in the coefficients' order.
    pub(crate) order: &'a [u8],
    pub(crate) factors: &'a [f32],
    /// Empty: all zero.
    pub(crate) mids: &'a [f32],
    /// Coefficients are weights, not negative, of which none may be lost; see [`super::query::is_coarse`].
    pub(crate) weights: bool,
}

/// What a kernel knows of a row of coefficients that it has rounded to int8.
#[derive(Clone, Copy)]
pub(crate) struct Rounded {
    /// Value of one unit.
    unit: f32,
    /// What the codes' centres and the mid-points add to every lane.
    offset: f32,
    /// See [`super::query::is_coarse`].
    is_coarse: bool,
}

/// The numbers of the rows that are coarse, first, and how many there are.
#[inline(always)]
fn listed<const N: usize>(is_coarse: &[bool]) -> ([usize; N], usize) {
    let (mut rows, mut n) = ([0; N], 0);
    for row in (0..is_coarse.len()).filter(|row| is_coarse[*row]) {
        rows[n] = row;
        n += 1;
    }
    (rows, n)
}

impl MixedPage<'_> {
    /// Twice the middle of the values that codes of `bits` bits stand for.
    #[inline(always)]
    pub(crate) fn twice_centre(&self, bits: usize) -> i32 {
        (2.0 * Quantizer::of_codes(bits, self.normal).centre()) as i32
    }

    /// How far the codes of a segment spread; see [`Quantizer::spread`].
    #[inline(always)]
    pub(crate) fn spread(&self, segment: usize) -> f32 {
        Quantizer::of_codes(self.segments.bits(segment), self.normal).spread()
    }

    /// Which coefficient belongs to place `d` of the depth.
    #[inline(always)]
    pub(crate) fn entry(&self, d: usize) -> usize {
        self.order.get(d).map_or(d, |&entry| usize::from(entry))
    }

    /// `out[row * stride + lane] += sum_d x[row * depth + order[d]] * value[lane][d]`: what the kernels compute.
    pub(crate) fn add_products(&self, x: &[f32], out: &mut [f32], stride: usize) {
        // Rows of coefficients may be longer than the depth: what is behind meets nothing.
        let (depth, row) = (self.tile.depth, self.factors.len());
        let mut value = [0f32; MAX_DEPTH];
        for lane in 0..self.tile.lanes {
            for d in 0..depth {
                let quantizer = Quantizer::of_codes(self.segments.bits(d / SEGMENT), self.normal);
                let code = self.tile.get(self.codes, &self.segments, lane, d);
                let mid = self.mids.get(d).copied().unwrap_or(0.0);
                value[self.entry(d)] = self.factors[d] * quantizer.value(code) + mid;
            }
            for (row, x) in x.chunks_exact(row).enumerate() {
                out[row * stride + lane] += quantizer::dot(&x[..depth], &value[..depth]);
            }
        }
    }
}

impl SideDesc {
    /// Fills in a tile of several widths.
    pub(crate) fn describe_mixed(&mut self, tile: &MixedTile) {
        self.budget = tile.budget() as u32;
        self.tile_bytes = tile.bytes() as u32;
        self.tile_words = (tile.block_bytes() / (LANE_BLOCK * 4)) as u32;
        (self.segment, self.n_segments) = (SEGMENT as u32, tile.n_segments() as u32);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all_segments(n: usize, budget: usize) -> Vec<Segments> {
        let pairs = (0..=n).flat_map(|four| (0..=n - four).map(move |three| (four, three)));
        pairs.filter_map(|(four, three)| Segments::complete(four, three, n, budget)).collect()
    }

    #[test]
    fn codes_read_back_for_every_split_of_the_budget() {
        for (lanes, depth, budget) in [(32, 64, 8), (64, 96, 14), (32, 128, 20), (32, 256, 32)] {
            let tile = MixedTile::new(lanes, depth, budget);
            let splits = all_segments(depth / SEGMENT, budget);
            assert!(splits.len() > 2);
            for segments in splits {
                let code = |i: usize| {
                    let width = segments.bits(i % depth / SEGMENT);
                    (i.wrapping_mul(2_654_435_761) >> 9) as u8 & ((1u16 << width) - 1) as u8
                };
                let (mut single, mut whole) = (vec![0xffu8; tile.bytes()], vec![0xffu8; tile.bytes()]);
                for lane in 0..lanes {
                    let codes: Vec<u8> = (0..depth).map(|d| code(lane * depth + d)).collect();
                    (0..depth).for_each(|d| tile.set(&mut single, &segments, lane, d, codes[d]));
                    tile.set_lane(&mut whole, &segments, lane, &codes);
                }
                assert_eq!(single, whole, "{segments:?}");
                whole.fill(0xff);
                for d in 0..depth {
                    let codes: Vec<u8> = (0..lanes).map(|lane| code(lane * depth + d)).collect();
                    tile.set_depth(&mut whole, &segments, d, &codes);
                }
                assert_eq!(single, whole, "{segments:?}");
                for d in 0..depth {
                    let mut codes = vec![7u8; lanes];
                    tile.get_depth(&single, &segments, d, &mut codes);
                    assert!((0..lanes).all(|lane| codes[lane] == code(lane * depth + d)), "{segments:?} {d}");
                }
                for i in 0..lanes * depth {
                    assert_eq!(tile.get(&single, &segments, i / depth, i % depth), code(i), "{segments:?} {i}");
                }
            }
        }
    }
}
