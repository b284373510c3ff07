//! From what was seen of a head to its part of a profile.
#![forbid(unsafe_code)]

use half::f16;
use nalgebra::{Cholesky, DMatrix, DVector, SymmetricEigen};

use super::{Samples, PAGE, SINKS};
use crate::codec::aqua::{AquaCodec, AquaParams};
use crate::codec::channel::ChannelParams;
use crate::codec::page::{PageCodec, PageRef, RowPlaces, SealRows, HEADER_BYTES};
use crate::codec::quantizer::Clip;
use crate::error::{Error, Result};
use crate::profile::{LayerProfile, Profile};
use crate::rotation::{Angles, Rotation};
use crate::shape::Shape;
use crate::simd::isa::IsaToken;

/// Part of the plain covariance of the keys, beside that of the tokens that matter.
const PLAIN_SHARE: f64 = 0.2;
/// Weights above this quantile count as it does.
const CLIP_AT: f64 = 0.999;
/// Added to the diagonal of a matrix that is to be divided by, as a part of its mean.
const RIDGE: f64 = 1e-3;
/// Weight that the values of all tokens have, beside that of tokens that matter.
const PLAIN_WEIGHT: f64 = 0.1;
/// How often the predictor is fitted again to the values that it is used for.
const REFITS: usize = 2;
/// Bits of the keys from which values are predicted.
const BITS: f32 = 2.25;

/// Key bias, key transform, predictor and offset of one head.
pub(super) fn solve(samples: &Samples, shape: Shape, rotation: &Rotation) -> Result<[Vec<f32>; 4]> {
    let pages = pages(samples, shape);
    if pages.len() < 2 {
        return Err(Error::invalid(format!("too little text: at least {} tokens are needed", 2 * PAGE)));
    }
    let bias = bias(&pages, rotation, shape.head_dim_k as usize);
    let transform = transform(samples, &pages, &bias, rotation);
    let transform: Vec<f32> = transform.transpose().iter().map(|x| rounded(*x as f32)).collect();
    let (k, v) = (shape.head_dim_k as usize, shape.head_dim_v as usize);
    let one = Shape { n_heads: shape.gqa_ratio() as u32, n_kv_heads: 1, ..shape };
    let unpredicted = [bias.clone(), transform.clone(), vec![0.0; v * k], vec![0.0; v]];
    let keys = reconstructed(&pages, LayerProfile::new(one, rotation.clone(), unpredicted)?, one)?;
    let [predictor, offset] = predictor(samples, &pages, &keys, k, v)?;
    Ok([bias, transform, predictor, offset])
}

/// As a file has it.
fn rounded(x: f32) -> f32 {
    f16::from_f32(x).to_f32()
}

/// A page of one text: all but sink tokens.
struct Page {
    /// Position of its first row.
    first: usize,
    /// Rows that are left out at the front.
    skipped: usize,
    /// Number of its first row among all that were seen.
    index: usize,
    keys: Vec<f32>,
    values: Vec<f32>,
}

fn pages(samples: &Samples, shape: Shape) -> Vec<Page> {
    let (k, v) = (shape.head_dim_k as usize, shape.head_dim_v as usize);
    let mut pages = Vec::new();
    let mut start = 0;
    for &n in &samples.lengths {
        // A page that is not full at the end is left out.
        for first in (0..n / PAGE).map(|page| page * PAGE) {
            let skipped = SINKS.saturating_sub(first);
            let rows = start + first + skipped..start + first + PAGE;
            let floats = |halves: &[f16]| halves.iter().map(|x| x.to_f32()).collect();
            pages.push(Page {
                first,
                skipped,
                index: rows.start,
                keys: floats(&samples.keys[rows.start * k..rows.end * k]),
                values: floats(&samples.values[rows.start * v..rows.end * v]),
            });
        }
        start += n;
    }
    pages
}

/// The mean key at position 0.
fn bias(pages: &[Page], rotation: &Rotation, dim: usize) -> Vec<f32> {
    let (mut sum, mut n, mut angles) = (vec![0f64; dim], 0, Angles::default());
    for page in pages {
        for (row, key) in page.keys.chunks_exact(dim).enumerate() {
            let mut key = key.to_vec();
            rotation.angles((page.first + page.skipped + row) as i32, &mut angles);
            rotation.turn_back(&mut key, &angles);
            sum.iter_mut().zip(key).for_each(|(sum, x)| *sum += f64::from(x));
            n += 1;
        }
    }
    sum.into_iter().map(|sum| (sum / f64::from(n)) as f32).collect()
}

/// `U' M^(1/2)`: `M` is how much errors of keys matter, `U` the eigenvectors of the keys' covariance in that metric.
fn transform(samples: &Samples, pages: &[Page], bias: &[f32], rotation: &Rotation) -> DMatrix<f64> {
    let dim = bias.len();
    let mut metric = DMatrix::from_row_slice(dim, dim, &samples.metric);
    let mean = metric.trace() / dim as f64;
    if mean > 0.0 {
        metric /= mean;
    }
    metric += DMatrix::identity(dim, dim) * RIDGE;
    let root = square_root(metric);
    let covariance = covariance(samples, pages, bias, rotation);
    let eigen = SymmetricEigen::new(&root * covariance * &root);
    let mut order: Vec<usize> = (0..dim).collect();
    order.sort_by(|a, b| eigen.eigenvalues[*b].total_cmp(&eigen.eigenvalues[*a]));
    let mut rows = DMatrix::zeros(dim, dim);
    for (to, &from) in order.iter().enumerate() {
        let vector = eigen.eigenvectors.column(from);
        // Either direction is an eigenvector: the one whose largest part is positive.
        let largest = vector.iter().fold(0.0f64, |a, x| if x.abs() > a.abs() { *x } else { a });
        rows.set_row(to, &(vector.transpose() * largest.signum()));
    }
    rows * root
}

fn square_root(matrix: DMatrix<f64>) -> DMatrix<f64> {
    let eigen = SymmetricEigen::new(matrix);
    let roots = eigen.eigenvalues.map(|x| x.max(0.0).sqrt());
    &eigen.eigenvectors * DMatrix::from_diagonal(&roots) * eigen.eigenvectors.transpose()
}

/// Covariance inside pages of keys in the frame of their page, without the bias.
fn covariance(samples: &Samples, pages: &[Page], bias: &[f32], rotation: &Rotation) -> DMatrix<f64> {
    let dim = bias.len();
    let weights = clipped(&samples.key_weights);
    let (mut by_weight, mut plain) = (DMatrix::zeros(dim, dim), DMatrix::zeros(dim, dim));
    let mut n = 0.0;
    for page in pages {
        let mut rows = DMatrix::from_iterator(dim, page.keys.len() / dim, framed(page, bias, rotation));
        let mean = rows.column_mean();
        rows.column_iter_mut().for_each(|mut row| row -= &mean);
        plain += &rows * rows.transpose();
        let mut weighted = rows.clone();
        weighted.column_iter_mut().enumerate().for_each(|(i, mut row)| row *= weights[page.index + i]);
        by_weight += weighted * rows.transpose();
        n += rows.ncols() as f64;
    }
    (by_weight * (1.0 - PLAIN_SHARE) + plain * PLAIN_SHARE) / n
}

/// The keys of a page in its frame, without the bias.
fn framed<'a>(page: &'a Page, bias: &'a [f32], rotation: &'a Rotation) -> impl Iterator<Item = f64> + 'a {
    let (mut origin, mut angles) = (Angles::default(), Angles::default());
    rotation.angles(page.first as i32, &mut origin);
    page.keys.chunks_exact(bias.len()).enumerate().flat_map(move |(row, key)| {
        let (mut key, mut expected) = (key.to_vec(), bias.to_vec());
        rotation.turn_back(&mut key, &origin);
        rotation.angles((page.skipped + row) as i32, &mut angles);
        rotation.turn(&mut expected, &angles);
        key.into_iter().zip(expected).map(|(x, b)| f64::from(x) - f64::from(b)).collect::<Vec<_>>()
    })
}

/// Weights of mean 1, none of which rules the rest.
fn clipped(weights: &[f32]) -> Vec<f64> {
    let mut sorted: Vec<f32> = weights.iter().copied().filter(|x| *x > 0.0).collect();
    sorted.sort_by(f32::total_cmp);
    let Some(top) = sorted.get((sorted.len() as f64 * CLIP_AT) as usize).or(sorted.last()).copied() else {
        return vec![1.0; weights.len()];
    };
    let clipped: Vec<f64> = weights.iter().map(|x| f64::from(x.min(top))).collect();
    let mean = clipped.iter().sum::<f64>() / clipped.len() as f64;
    clipped.into_iter().map(|x| x / mean).collect()
}

/// The keys of all pages as they are read back from codes, in the frames of the pages.
fn reconstructed(pages: &[Page], profile: LayerProfile, shape: Shape) -> Result<Vec<f64>> {
    let channel = ChannelParams { bits: BITS, adaptive: true, clip: Clip::Auto, refit: true, half: false };
    let mut all = Profile::default();
    all.set(0, profile)?;
    let params = AquaParams { channel, bias: true, klt: true, predict: false, path: String::new(), profile: Some(all) };
    let codec = AquaCodec::new(&params, 0, shape, PAGE, IsaToken::detect()?)?;
    let dim = shape.head_dim_k as usize;
    let (mut header, mut bytes) = ([0; HEADER_BYTES], vec![0; codec.page_bytes()]);
    let (mut found, mut key) = (Vec::new(), vec![0f32; dim]);
    for page in pages {
        let at: Vec<u32> = (page.skipped as u32..PAGE as u32).collect();
        let positions: Vec<i32> = at.iter().map(|row| (page.first as u32 + row) as i32).collect();
        let [channel_weights, attention]: [&[f32]; 2] = [&[], &[]];
        let mut rows = SealRows {
            at: &at,
            rows: &mut page.keys.clone(),
            fresh: true,
            exact: &[],
            channel_weights,
            last_exponents: &mut [],
            attention,
            place: Some(RowPlaces { head: 0, positions: &positions }),
        };
        codec.seal(&mut header, &mut bytes, &mut rows);
        for row in page.skipped..PAGE {
            codec.framed_key(PageRef { header: &header, bytes: &bytes }, row, &mut key);
            found.extend(key.iter().map(|x| f64::from(*x)));
        }
    }
    Ok(found)
}

/// The predictor and the offset that leave least of the values that they are used for.
fn predictor(samples: &Samples, pages: &[Page], keys: &[f64], k: usize, v: usize) -> Result<[Vec<f32>; 2]> {
    let of_tokens = clipped(&samples.value_weights);
    let weights: Vec<f64> = pages
        .iter()
        .flat_map(|page| of_tokens[page.index..][..PAGE - page.skipped].iter().map(|w| w + PLAIN_WEIGHT))
        .collect();
    let values: Vec<f64> = pages.iter().flat_map(|page| page.values.iter().map(|x| f64::from(*x))).collect();
    let mut used = vec![true; weights.len()];
    let mut solution = DMatrix::zeros(k + 1, v);
    for _ in 0..=REFITS {
        let Some(found) = regression(keys, &values, &weights, &used, k, v) else { break };
        solution = found;
        for (i, used) in used.iter_mut().enumerate() {
            let value = DVector::from_row_slice(&values[i * v..][..v]);
            let key = DVector::from_iterator(k + 1, keys[i * k..][..k].iter().copied().chain([1.0]));
            let left = &value - solution.tr_mul(&key);
            *used = left.norm_squared() < value.norm_squared();
        }
    }
    let predictor = solution.rows(0, k).iter().map(|x| rounded(*x as f32)).collect();
    let offset = solution.row(k).iter().map(|x| *x as f32).collect();
    Ok([predictor, offset])
}

/// Ridge regression of values on keys and a constant, `[k + 1][v]`. `None` if hardly any row is used.
fn regression(
    keys: &[f64],
    values: &[f64],
    weights: &[f64],
    used: &[bool],
    k: usize,
    v: usize,
) -> Option<DMatrix<f64>> {
    let rows: Vec<usize> = (0..used.len()).filter(|row| used[*row]).collect();
    if rows.len() < PAGE {
        return None;
    }
    let (mut squares, mut products) = (DMatrix::zeros(k + 1, k + 1), DMatrix::zeros(k + 1, v));
    for rows in rows.chunks(PAGE) {
        let x = DMatrix::from_iterator(
            k + 1,
            rows.len(),
            rows.iter().flat_map(|row| keys[row * k..][..k].iter().copied().chain([1.0])),
        );
        let y =
            DMatrix::from_iterator(v, rows.len(), rows.iter().flat_map(|row| values[row * v..][..v].iter().copied()));
        let mut weighted = x.clone();
        weighted.column_iter_mut().zip(rows).for_each(|(mut column, row)| column *= weights[*row]);
        squares += &weighted * x.transpose();
        products += weighted * y.transpose();
    }
    let ridge = RIDGE * squares.view((0, 0), (k, k)).trace() / k as f64;
    (0..k).for_each(|i| squares[(i, i)] += ridge);
    Some(Cholesky::new(squares)?.solve(&products))
}
