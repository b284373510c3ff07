//! Codec `aqua` against codec `channel`, and what it promises whatever the positions are.
#![forbid(unsafe_code)]

use super::{AquaCodec, AquaParams};
use crate::codec::channel::scalar::decode_page;
use crate::codec::channel::ChannelCodec;
use crate::codec::mixed::NMSE;
use crate::codec::page::{PageCodec, PageRef, RowPlaces, SealRows};
use crate::codec::query::{Probabilities, Query};
use crate::codec::CodecParams;
use crate::profile::{LayerProfile, Profile};
use crate::recipe::Recipe;
use crate::reference::nmse;
use crate::rotation::{Angles, Rotation};
use crate::shape::Shape;
use crate::simd::isa::{Isa, IsaToken};
use crate::tests::profile;
use crate::tests::random::Rng;

const DIM: usize = 64;
const PAGE: usize = 128;
const SHAPE: Shape = Shape { n_heads: 2, n_kv_heads: 2, head_dim_k: DIM as u32, head_dim_v: DIM as u32 };

fn params(spec: &str, profile: &Profile) -> AquaParams {
    let recipe = Recipe::parse(spec).unwrap().with_profile(profile).unwrap();
    let CodecParams::Aqua(params) = recipe.key else { panic!("{spec} is another codec") };
    params
}

fn codec(spec: &str, profile: &Profile) -> AquaCodec {
    AquaCodec::new(&params(spec, profile), 0, SHAPE, PAGE, IsaToken::new(Isa::Scalar).unwrap()).unwrap()
}

/// A sealed page.
struct Page {
    header: [u8; 4],
    bytes: Vec<u8>,
}

impl Page {
    fn new(codec: &dyn PageCodec, keys: &[f32], positions: &[i32]) -> Self {
        let mut page = Page { header: [0; 4], bytes: vec![0; codec.page_bytes()] };
        page.seal(codec, &(0..positions.len() as u32).collect::<Vec<_>>(), keys, positions, true);
        page
    }

    fn seal(&mut self, codec: &dyn PageCodec, at: &[u32], keys: &[f32], positions: &[i32], fresh: bool) {
        let [channel_weights, attention]: [&[f32]; 2] = [&[], &[]];
        let rows = &mut keys.to_vec()[..];
        let place = Some(RowPlaces { head: 1, positions });
        let last_exponents = &mut [];
        let mut rows = SealRows { at, rows, fresh, exact: &[], channel_weights, last_exponents, attention, place };
        codec.seal(&mut self.header, &mut self.bytes, &mut rows);
    }

    fn as_ref(&self) -> PageRef<'_> {
        PageRef { header: &self.header, bytes: &self.bytes }
    }

    fn decoded(&self, codec: &dyn PageCodec) -> Vec<f32> {
        let mut out = vec![0f32; PAGE * DIM];
        out.chunks_exact_mut(DIM).enumerate().for_each(|(row, out)| codec.decode(self.as_ref(), row, out));
        out
    }
}

fn rotation() -> Rotation {
    Rotation::new(&(0..32).map(|pair| 1e4f64.powf(-f64::from(pair) / 32.0)).collect::<Vec<_>>(), false).unwrap()
}

/// Keys of a constant, a part that lies in a plane of eight directions, and little else, and values that follow from them.
/// The profile knows all that.
fn model(rng: &mut Rng, positions: &[i32]) -> (Vec<f32>, Vec<f32>, Profile) {
    let bias = rng.values(DIM).iter().map(|x| 3.0 * x).collect::<Vec<f32>>();
    let directions = rng.values(8 * DIM);
    let weights: Vec<f32> = rng.values(DIM * DIM).iter().map(|x| x / 8.0).collect();
    let (mut keys, mut values) = (Vec::new(), Vec::new());
    let (rotation, mut angles) = (rotation(), Angles::default());
    let first = positions[0];
    for &position in positions {
        let mut frame: Vec<f32> = rng.values(DIM).iter().map(|x| 0.1 * x).collect();
        for (part, direction) in rng.values(8).iter().zip(directions.chunks_exact(DIM)) {
            frame.iter_mut().zip(direction).for_each(|(x, d)| *x += part * d);
        }
        let noise = rng.values(DIM);
        values.extend(
            weights
                .chunks_exact(DIM)
                .zip(&noise)
                .map(|(w, noise)| w.iter().zip(&frame).map(|(w, x)| w * x).sum::<f32>() + 0.3 * noise),
        );
        rotation.angles(first, &mut angles);
        rotation.turn(&mut frame, &angles);
        let mut constant = bias.clone();
        rotation.angles(position, &mut angles);
        rotation.turn(&mut constant, &angles);
        keys.extend(frame.iter().zip(constant).map(|(x, b)| x + b));
    }
    // The directions first, made independent of each other; then whatever is left.
    let mut basis: Vec<Vec<f32>> = Vec::new();
    for candidate in directions.chunks_exact(DIM).map(<[f32]>::to_vec).chain((0..DIM).map(|_| rng.values(DIM))) {
        let mut row = candidate;
        for known in &basis {
            let along: f32 = row.iter().zip(known).map(|(a, b)| a * b).sum();
            row.iter_mut().zip(known).for_each(|(x, b)| *x -= along * b);
        }
        let length = row.iter().map(|x| x * x).sum::<f32>().sqrt();
        row.iter_mut().for_each(|x| *x /= length);
        basis.push(row);
        basis.truncate(DIM);
    }
    let twice = |one: Vec<f32>| [one.clone(), one].concat();
    let arrays = [twice(bias), twice(basis.concat()), twice(weights), vec![0.0; 2 * DIM]];
    let mut profile = Profile::default();
    profile.set(0, LayerProfile::new(SHAPE, rotation, arrays).unwrap()).unwrap();
    (keys, values, profile)
}

fn error(a: &[f32], b: &[f32]) -> f64 {
    nmse(a, &b.iter().map(|x| f64::from(*x)).collect::<Vec<_>>())
}

#[test]
fn bias_and_transform_each_lessen_the_error_of_keys() {
    let positions: Vec<i32> = (7000..7000 + PAGE as i32).collect();
    let (keys, _, profile) = model(&mut Rng::new(3), &positions);
    let of = |spec: &str| {
        let codec = codec(spec, &profile);
        error(&Page::new(&codec, &keys, &positions).decoded(&codec), &keys)
    };
    let kivi = {
        let params = &params("aqua:k=2", &profile).channel;
        let codec = ChannelCodec::new(params, DIM, PAGE, IsaToken::new(Isa::Scalar).unwrap()).unwrap();
        error(&Page::new(&codec, &keys, &positions).decoded(&codec), &keys)
    };
    let [none, bias, both] = [of("aqua:k=2,bias=0,klt=0"), of("aqua:k=2,klt=0"), of("aqua:k=2")];
    assert!(none < 1.6 * kivi && bias < 0.8 * kivi && both < 0.3 * bias, "{kivi} {none} {bias} {both}");
}

#[test]
fn values_are_predicted_where_that_helps() {
    let positions: Vec<i32> = (500..500 + PAGE as i32).collect();
    let (keys, mut values, profile) = model(&mut Rng::new(4), &positions);
    // One that has nothing to do with its key.
    values[9 * DIM..10 * DIM].iter_mut().for_each(|x| *x = 1e-3);
    let codec = codec("aqua:k=2", &profile);
    let mut page = Page::new(&codec, &keys, &positions);
    let at: Vec<u32> = (0..PAGE as u32).collect();
    let mut rest = values.clone();
    let Page { header, bytes } = &mut page;
    codec.predictor().unwrap().take(header, bytes, &at, &mut rest);
    let square = |x: &[f32]| x.iter().map(|x| x * x).sum::<f32>();
    assert!(square(&rest) < 0.5 * square(&values), "{} of {}", square(&rest), square(&values));
    assert!(!codec.gate(&page.bytes, 9) && (0..PAGE).filter(|row| codec.gate(&page.bytes, *row)).count() > PAGE / 2);
    for (row, value) in rest.chunks_exact_mut(DIM).enumerate() {
        codec.predictor().unwrap().add(page.as_ref(), row, value);
    }
    assert!(error(&rest, &values) < 1e-10);
    assert!(self::codec("aqua:predict=0", &profile).predictor().is_none());
}

/// Rows of any positions: what is decoded is what was coded, and the bias is taken off only where it helps.
#[test]
fn pages_of_scattered_positions_are_coded_without_the_bias() {
    let mut rng = Rng::new(5);
    let (_, _, profile) = model(&mut rng, &[0; PAGE]);
    let codec = codec("aqua:k=4", &profile);
    let keys = rng.values(PAGE * DIM);
    let scattered: Vec<i32> = (0..PAGE).map(|_| rng.below(100_000) as i32).collect();
    // A second sequence, which starts anew in the middle of the page.
    let half =
        |n: usize| (0..PAGE).map(|row| if row < n { 300 + row as i32 } else { row as i32 }).collect::<Vec<i32>>();
    for (positions, first, biased) in [
        (scattered, None, false),
        (half(PAGE / 2), None, true),
        (half(PAGE - 1), Some(300), true),
        ((0..PAGE as i32).map(|row| row - 90).collect(), Some(-90), true),
    ] {
        let page = Page::new(&codec, &keys, &positions);
        let place = codec.place(&page.bytes);
        assert!(first.is_none_or(|first| place.first == first) && place.biased == biased, "{place:?}");
        let found = error(&page.decoded(&codec), &keys);
        assert!(found < 0.05, "{place:?}: {found}");
    }
}

/// Scores and outputs are those of the decoded rows, also of rows that have joined the page.
#[test]
fn attention_reads_what_decoding_gives() {
    let mut rng = Rng::new(6);
    for spec in ["aqua", "aqua:klt=0", "aqua:bias=0"] {
        let codec = codec(spec, &profile::profile(SHAPE, 2));
        let positions: Vec<i32> = (70_000..70_000 + PAGE as i32).collect();
        let mut page = Page::new(&codec, &rng.values(PAGE * DIM), &positions);
        let before = page.decoded(&codec);
        page.seal(&codec, &[5, 77], &rng.values(2 * DIM), &[3, 9], false);
        let keys = page.decoded(&codec);
        let is_same = |row: usize| before[row * DIM..][..DIM] == keys[row * DIM..][..DIM];
        assert!((0..PAGE).all(|row| is_same(row) != [5, 77].contains(&row)), "{spec}");

        let queries = rng.values(3 * DIM);
        let (mut query, mut scores) = (Query::default(), vec![0f32; 3 * PAGE]);
        codec.begin_query(&queries, &mut query);
        codec.scores(page.as_ref(), &mut query, &mut scores);
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
        let want: Vec<f64> =
            queries.chunks_exact(DIM).flat_map(|q| keys.chunks_exact(DIM).map(move |key| dot(q, key))).collect();
        assert!(nmse(&scores, &want) < 1e-6, "{spec}: {}", nmse(&scores, &want));

        let predictor = codec.predictor().unwrap();
        let (at, mut rest) = ((0..PAGE as u32).collect::<Vec<_>>(), vec![0f32; PAGE * DIM]);
        for (row, value) in rest.chunks_exact_mut(DIM).enumerate() {
            // Every third one has nothing to do with its key.
            codec.predict(page.as_ref(), row, value);
            let share = if row % 3 == 0 { -1.0 } else { 1.0 };
            value.iter_mut().for_each(|x| *x = share * *x + 0.1 * rng.normal());
        }
        let Page { header, bytes } = &mut page;
        predictor.take(header, bytes, &at, &mut rest);
        let mut p = Probabilities::default();
        p.resize(2, PAGE);
        p.p.iter_mut().for_each(|p| *p = rng.below(100) as f32 / 1000.0);
        let weights = p.p.to_vec();
        let (mut out, mut want) = (vec![1f32; 2 * DIM], vec![1f64; 2 * DIM]);
        let mut sums = vec![0f32; 2 * predictor.n_sums()];
        predictor.accumulate(page.as_ref(), &mut p, &mut sums);
        predictor.finish(1, &sums, &mut out);
        for row in 0..PAGE {
            let mut value = [0f32; DIM];
            predictor.add(page.as_ref(), row, &mut value);
            for (want, weights) in want.chunks_exact_mut(DIM).zip(weights.chunks_exact(PAGE)) {
                want.iter_mut().zip(value).for_each(|(want, x)| *want += f64::from(weights[row]) * f64::from(x));
            }
        }
        assert!((0..PAGE).all(|row| codec.gate(&page.bytes, row) == (row % 3 > 0)), "{spec}");
        assert!(nmse(&out, &want) < 1e-8, "{spec}: {}", nmse(&out, &want));
    }
}

/// Every instruction set gives what the specification gives, for heads and pages of all sizes and any number of rows.
#[test]
fn kernels_follow_the_specification() {
    let mut rng = Rng::new(8);
    for (dim, page, spec) in [
        (64, 128, "aqua"),
        (64, 128, "aqua:klt=0"),
        (96, 64, "aqua:k=3"),
        (128, 128, "aqua:bias=0"),
        (128, 64, "aqua:k=4"),
        (256, 256, "aqua"),
    ] {
        let shape = Shape { head_dim_k: dim as u32, head_dim_v: dim as u32, ..SHAPE };
        let params = params(spec, &profile::profile(shape, 4));
        let of = |isa| Some(AquaCodec::new(&params, 0, shape, page, IsaToken::new(isa)?).unwrap());
        let reference = of(Isa::Scalar).unwrap();
        let positions: Vec<i32> = (40_000..40_000 + page as i32).collect();
        let keys: Vec<f32> = rng.values(page * dim).iter().enumerate().map(|(i, x)| x * (i % dim % 9) as f32).collect();
        let mut sealed = Page::new(&reference, &keys, &positions);
        (0..page).for_each(|row| reference.set_gate(&mut sealed.bytes, row, row % 3 > 0));
        let n_rows = 7;
        let queries = rng.values(n_rows * dim);
        // Of like size, one that outweighs all others, none.
        let mut p = Probabilities::default();
        p.resize(n_rows, page);
        for (row, p) in p.p.chunks_exact_mut(page).enumerate() {
            p.iter_mut().for_each(|p| *p = [1.0, 1e-2, 0.0][row % 3] * rng.normal().abs());
            p[4] += [0.0, 8.0, 0.0][row % 3];
        }
        let n_sums = dim + 1;
        let attended = |codec: &AquaCodec, p: &mut Probabilities, n: usize| {
            let (mut query, mut scores, mut sums) = (Query::default(), vec![9f32; n * page], vec![0.5f32; n * n_sums]);
            codec.begin_query(&queries[..n * dim], &mut query);
            codec.scores(sealed.as_ref(), &mut query, &mut scores);
            p.n_rows = n;
            codec.kernels.add_keys(codec, sealed.as_ref(), p, &mut sums);
            (scores, sums)
        };
        let want = attended(&reference, &mut p, n_rows);
        let wide = |x: &[f32]| x.iter().map(|x| f64::from(*x)).collect::<Vec<_>>();
        for codec in Isa::ALL.into_iter().filter_map(of).filter(|codec| codec.token.isa() != Isa::Scalar) {
            for n in [1, 2, 3, 4, n_rows] {
                let found = attended(&codec, &mut p, n);
                let what = format!("{spec} {dim} {page} {:?} {n}", codec.token);
                for (row, found) in found.0.chunks_exact(page).enumerate() {
                    let error = nmse(found, &wide(&want.0[row * page..][..page]));
                    assert!(error < NMSE, "scores, {what}, row {row}: {error}");
                }
                for (row, found) in found.1.chunks_exact(n_sums).enumerate() {
                    let error = nmse(found, &wide(&want.1[row * n_sums..][..n_sums]));
                    assert!(error < NMSE, "sums, {what}, row {row}: {error}");
                }
            }
        }
    }
}

/// All rows at once are the rows one by one.
#[test]
fn whole_pages_decode_as_their_rows() {
    let codec = codec("aqua", &profile::profile(SHAPE, 3));
    let page = Page::new(&codec, &Rng::new(7).values(PAGE * DIM), &(0..PAGE as i32).collect::<Vec<_>>());
    let inner = codec.inner(codec.place(&page.bytes));
    let (mut all, mut row) = (vec![0f32; inner.head_dim * PAGE], vec![0f32; inner.head_dim]);
    decode_page(inner, page.as_ref(), &mut all);
    for token in 0..PAGE {
        inner.decode(page.as_ref(), token, &mut row);
        assert!((0..inner.head_dim).all(|c| all[c * PAGE + token] == row[c]), "{token}");
    }
}

#[test]
fn profiles_are_part_of_the_format_and_of_other_heads_refused() {
    let [a, b] = [1, 2].map(|seed| profile::profile(SHAPE, seed));
    assert_eq!(codec("aqua", &a).format(), codec("aqua", &a.clone()).format());
    assert_ne!(codec("aqua", &a).format(), codec("aqua", &b).format());
    let token = IsaToken::new(Isa::Scalar).unwrap();
    let refused = |params: &AquaParams, layer: usize, shape: Shape| {
        AquaCodec::new(params, layer, shape, PAGE, token).unwrap_err().message().to_owned()
    };
    let given = params("aqua", &a);
    assert!(refused(&given, 99, SHAPE).contains("says nothing of layer 99"));
    let other = Shape { n_kv_heads: 1, ..SHAPE };
    assert!(refused(&given, 0, other).contains("(2, 64, 64) KV heads and head sizes in layer 0, the model (1, 64, 64)"));
    assert!(refused(&AquaParams { profile: None, ..given.clone() }, 0, SHAPE).contains("llama-kvq-calibrate"));
    let unread = AquaParams { profile: None, path: "x.gguf".into(), ..given };
    assert!(refused(&unread, 0, SHAPE).contains("has not been read"));
}

#[test]
fn numbers_that_cannot_be_are_refused() {
    let size = |n: usize| vec![0.5f32; 2 * n];
    let arrays = || [size(DIM), size(DIM * DIM), size(DIM * DIM), size(DIM)];
    let refused = |arrays| LayerProfile::new(SHAPE, rotation(), arrays).unwrap_err().message().to_owned();
    let mut short = arrays();
    short[2].pop();
    assert!(refused(short).contains("predictor has 8191 numbers instead of 8192"));
    let mut spoiled = arrays();
    spoiled[0][3] = f32::NAN;
    assert!(refused(spoiled).contains("key bias has numbers that are not finite"));
    // Every row is the same: nothing leads back.
    let mut profile = Profile::default();
    profile.set(0, LayerProfile::new(SHAPE, rotation(), arrays()).unwrap()).unwrap();
    let error = AquaCodec::new(&params("aqua", &profile), 0, SHAPE, PAGE, IsaToken::new(Isa::Scalar).unwrap());
    assert!(error.unwrap_err().message().contains("has no inverse"));
}
