//! Attention of every recipe and instruction set against the 64-bit oracle on the rows that the cache really holds.
#![forbid(unsafe_code)]

use super::args::alibi_slope;
use super::*;
use crate::codec::page::Side;
use crate::head::HeadMut;
use crate::layout::Layout;
use crate::location::{Location, IN_PAGE, IN_SLOT};
use crate::plan::{Plan, View};
use crate::planner::{Planner, Row};
use crate::recent::Attended;
use crate::recipe::Recipe;
use crate::reference;
use crate::rows::finite;
use crate::rows::Rows;
use crate::shape::Shape;
use crate::simd::isa::{Isa, IsaToken};
use crate::store::{dequantize_head, store_head, StoreRows};
use crate::tests::random::Rng;

const IN_ITS_PAGE: Location = Location { places: IN_PAGE, slot: 0, turned: 0 };

/// Roughly normal, with a few channels that are much larger, as keys have.
fn random_rows(rng: &mut Rng, n: usize, dim: usize) -> Vec<f32> {
    let wide = |(i, x): (usize, f32)| if i % dim % 37 == 5 { 4.0 * x + 6.0 } else { x };
    rng.values(n * dim).into_iter().enumerate().map(wide).collect()
}

/// A case: one layer that is fed ubatches; every output row is compared.
struct Case {
    spec: &'static str,
    shape: Shape,
    n_cells: usize,
    ubatches: &'static [usize],
    softcap: f32,
    max_bias: f32,
    sinks: bool,
    swa: i32,
    n_splits: usize,
    f16_mask: bool,
    /// Before the last ubatch, remove all but the first 60 tokens: sealed pages then lie beyond the mask.
    rewind: bool,
    /// Layer of the model: the first ones may go without an outlier pool.
    layer: usize,
}

/// Bound on the normalised mean squared error of a kernel against the oracle on the decoded rows: that of the key codec,
/// which is the first that a page's format names.
fn bound(spec: &str) -> f64 {
    let recipe = Recipe::parse(spec).unwrap();
    let format = Layout::new(&recipe, LLAMA, 0, 256, 256).unwrap().format();
    let codec = crate::codec::REGISTRY.iter().find(|codec| format.starts_with(&format!("k={}/", codec.name)));
    codec.expect("every codec has a row").nmse
}

fn run(case: &Case, isa: Isa, seed: u64) -> Option<(f64, Vec<u8>)> {
    let token = IsaToken::new(isa)?;
    let recipe = Recipe::parse(case.spec).unwrap();
    let mut planner = Planner::new(recipe.planner_config(case.n_cells, 1, 1)).unwrap();
    let layout = Layout::with_isa(&recipe, case.shape, case.layer, case.n_cells, planner.n_slots(), token).unwrap();
    let (mut k_mem, mut v_mem) = (vec![0u8; layout.k_bytes()], vec![0u8; layout.v_bytes()]);
    let mut rng = Rng::new(seed);
    let mut pos_of_cell = vec![-1i32; case.n_cells];
    let (mut head, mut pos) = (rng.below(30), 0);
    let (mut error, mut power) = (0f64, 0f64);
    for (i, &n) in case.ubatches.iter().enumerate() {
        if case.rewind && i + 1 == case.ubatches.len() {
            let kept = pos_of_cell.iter().position(|p| *p == 60).unwrap();
            pos_of_cell[kept..].fill(-1);
            (head, pos) = (kept, 60);
        }
        let rows: Vec<Row> =
            (0..n as i32).map(|i| Row { cell: (head as i32 + i) as u32, pos: pos + i, seq: 0 }).collect();
        head += n;
        let shape = case.shape;
        let (nh, nkv) = (shape.n_heads as usize, shape.n_kv_heads as usize);
        let (dk, dv) = (shape.head_dim_k as usize, shape.head_dim_v as usize);
        let (q, k, v) =
            (random_rows(&mut rng, n * nh, dk), random_rows(&mut rng, n * nkv, dk), random_rows(&mut rng, n * nkv, dv));
        let mut ints = vec![0; crate::plan::plan_len(n, planner.n_slots(), case.n_cells, recipe.page)];
        planner.plan(0, &rows, &|cell| pos_of_cell[cell] >= 0, &mut ints).unwrap();
        let plan = Plan::new(&ints).unwrap();
        plan.check_entries().unwrap();
        for row in &rows {
            pos_of_cell[row.cell as usize] = row.pos;
        }
        let n_kv = 1 + pos_of_cell.iter().rposition(|p| *p >= 0).unwrap();
        let mask: Vec<f32> = rows
            .iter()
            .flat_map(|row| {
                pos_of_cell[..n_kv].iter().map(move |&p| match p {
                    p if p < 0 || p > row.pos || row.pos - p >= case.swa => f32::NEG_INFINITY,
                    p if case.max_bias > 0.0 => -((row.pos - p) as f32),
                    _ => 0.0,
                })
            })
            .collect();
        let half: Vec<u16> = mask.iter().map(|m| half::f16::from_f32(*m).to_bits()).collect();
        let sink_logits: Vec<f32> = (0..nh).map(|h| h as f32 * 0.7 - 1.0).collect();
        let stride = |heads, dim| (heads * dim, dim);
        fn rows_of(data: &[f32], (stride_token, stride_head): (usize, usize)) -> Rows<'_> {
            Rows { data, stride_token, stride_head }
        }
        let args = AttendArgs {
            q: rows_of(&q, stride(nh, dk)),
            current: Some((rows_of(&k, stride(nkv, dk)), rows_of(&v, stride(nkv, dv)))),
            k_mem: &k_mem,
            v_mem: &v_mem,
            plan,
            rotation: None,
            mask: if case.f16_mask { Mask::F16(&half) } else { Mask::F32(&mask) },
            mask_stride_token: n_kv,
            n_kv,
            sink_logits: case.sinks.then_some(&sink_logits),
            scale: 0.09,
            softcap: case.softcap,
            max_bias: case.max_bias,
            n_tokens: n,
            n_splits: case.n_splits,
            with_lse: true,
        };
        let (out, mut lse) = collect(&layout, &args);
        let expected = oracle(&layout, &args, &pos_of_cell, &k, &v, &mask, &k_mem, &v_mem);
        // Sealing follows these, so that they must not depend on the kernels for the bytes to be equal.
        let attended: Vec<f32> = std::mem::replace(&mut lse, vec![5.0; n * nh]);
        for (row, (expected, want)) in expected {
            lse[row] = want as f32;
            // The scores' error, relative to the largest of them, is what the logarithm of their sum may be off by.
            let off = (f64::from(attended[row]) - want).abs() / want.abs().max(1.0);
            assert!(off <= bound(case.spec).sqrt(), "{}: log-sum-exp {} instead of {want}", case.spec, attended[row]);
            let at = row * dv;
            let row = &out[at..at + expected.len()];
            error += row.iter().zip(&expected).map(|(a, b)| (f64::from(*a) - b).powi(2)).sum::<f64>();
            power += expected.iter().map(|b| b * b).sum::<f64>();
        }
        let rows = StoreRows {
            positions: None,
            k: rows_of(&k, stride(nkv, dk)),
            v: rows_of(&v, stride(nkv, dv)),
            q: Some(rows_of(&q, stride(nh, dk))),
            attended: Some(Attended { lse: &lse, scale: args.scale }),
            rotation: None,
        };
        let keys = k_mem.chunks_exact_mut(layout.head_bytes(Side::Key));
        let values = v_mem.chunks_exact_mut(layout.head_bytes(Side::Value));
        for (h, (key, value)) in keys.zip(values).enumerate() {
            store_head(&layout, h, [key, value], &rows, &plan).unwrap();
        }
        pos += n as i32;
    }
    k_mem.extend(v_mem);
    Some((error / power, k_mem))
}

/// Runs all parts, and the combination of splits, and returns the rows and the logarithms of their denominators.
fn collect(layout: &Layout, args: &AttendArgs) -> (Vec<f32>, Vec<f32>) {
    let (nh, dv) = (layout.shape().n_heads as usize, layout.shape().head_dim_v as usize);
    let n_rows = args.n_tokens * nh;
    let extra = if args.n_splits > 1 { 2 } else { 0 };
    let mut out = vec![f32::NAN; args.n_splits * n_rows * (dv + extra) + if extra == 0 { n_rows } else { 0 }];
    for part in 0..3 {
        attend(layout, args, part, 3, &mut |at, row| {
            assert!(out[at..at + row.len()].iter().all(|x| x.is_nan()), "a row is emitted twice");
            out[at..at + row.len()].copy_from_slice(row);
        })
        .unwrap();
    }
    if args.n_splits == 1 {
        let lse = out.split_off(n_rows * dv);
        return (out, lse);
    }
    let mut last = vec![f32::NAN; n_rows * (dv + 1)];
    for part in 0..2 {
        let mut emit = |at: usize, row: &[f32]| last[at..at + row.len()].copy_from_slice(row);
        combine(layout, &out, args.sink_logits, args.n_splits, args.n_tokens, true, part, 2, &mut emit).unwrap();
    }
    let lse = last.split_off(n_rows * dv);
    (last, lse)
}

/// The oracle on the rows as the cache holds them before the store, with the ubatch's own rows exact: for some query rows
/// the output and the logarithm of the denominator.
#[allow(clippy::too_many_arguments)]
fn oracle(
    layout: &Layout,
    args: &AttendArgs,
    pos_of_cell: &[i32],
    k: &[f32],
    v: &[f32],
    mask: &[f32],
    k_mem: &[u8],
    v_mem: &[u8],
) -> Vec<(usize, (Vec<f64>, f64))> {
    let shape = layout.shape();
    let (nh, nkv) = (shape.n_heads as usize, shape.n_kv_heads as usize);
    let (dk, dv) = (shape.head_dim_k as usize, shape.head_dim_v as usize);
    let n_cells = layout.n_cells();
    let mut location = vec![Location::default(); n_cells];
    for page in 0..layout.n_pages() {
        for (i, word) in args.plan.page_bits(View::Before, page).iter().enumerate() {
            for bit in (0..32).filter(|bit| word >> bit & 1 == 1) {
                location[page * layout.page() + i * 32 + bit] = IN_ITS_PAGE;
            }
        }
    }
    for (slot, &cell) in args.plan.slot_cells(View::Before).iter().enumerate().filter(|(_, cell)| **cell >= 0) {
        assert!(!location[cell as usize].is_held(), "a cell is readable twice");
        location[cell as usize] = Location { places: IN_SLOT, slot: slot as u32, turned: 0 };
    }
    // Every ninth token of a large ubatch and its last one: the oracle is slow.
    let checked = |token: &usize| token % 9 == 4 || token + 1 == args.n_tokens;
    let mut out = Vec::new();
    for kv_head in 0..nkv {
        let mut rows = [vec![0f32; n_cells * dk], vec![0f32; n_cells * dv]];
        for (side, mem, new, dim) in [(Side::Key, k_mem, k, dk), (Side::Value, v_mem, v, dv)] {
            let bytes = layout.head_bytes(side);
            let region = &mem[kv_head * bytes..][..bytes];
            let rows = &mut rows[side as usize];
            dequantize_head(layout, side, region, &location, None, 0..n_cells, rows).unwrap();
            for (row, &cell) in args.plan.row_cells().iter().enumerate() {
                let from = &new[(row * nkv + kv_head) * dim..][..dim];
                let to = &mut rows[cell as usize * dim..][..dim];
                to.iter_mut().zip(from).for_each(|(t, x)| *t = finite(*x));
            }
        }
        for token in (0..args.n_tokens).filter(checked) {
            for h in kv_head * nh / nkv..(kv_head + 1) * nh / nkv {
                let slope = f64::from(alibi_slope(h, nh, args.max_bias));
                let bias: Vec<f64> = (0..n_cells)
                    .map(|cell| {
                        let held = location[cell].is_held() || args.plan.row_cells().contains(&(cell as i32));
                        assert!(held || pos_of_cell[cell] < 0, "a live cell is readable nowhere");
                        let mask = if cell < args.n_kv { mask[token * args.n_kv + cell] } else { f32::NEG_INFINITY };
                        f64::from(mask) * slope
                    })
                    .collect();
                let query = reference::Query {
                    q: args.q.row(token, h, dk),
                    scale: f64::from(args.scale),
                    softcap: f64::from(args.softcap),
                    bias: &bias,
                    sink_logit: args.sink_logits.map(|s| f64::from(s[h])),
                };
                out.push((token * nh + h, reference::attention(&query, &rows[0], &rows[1], dv)));
            }
        }
    }
    out
}

const LLAMA: Shape = Shape { n_heads: 6, n_kv_heads: 2, head_dim_k: 128, head_dim_v: 128 };

const BASE: Case = Case {
    spec: "skvq",
    shape: LLAMA,
    n_cells: 420,
    ubatches: &[200, 1, 61, 1, 90, 2],
    softcap: 0.0,
    max_bias: 0.0,
    sinks: false,
    swa: i32::MAX,
    n_splits: 1,
    f16_mask: true,
    rewind: false,
    layer: 2,
};

/// Runs a case on every instruction set of this machine.
fn check(case: &Case) {
    let mut sealed: Option<Vec<u8>> = None;
    let bound = bound(case.spec);
    for isa in Isa::ALL {
        let Some((error, bytes)) = run(case, isa, 12345) else { continue };
        let what = format!("{} {:?} on {}", case.spec, case.shape, isa.name());
        assert!(error <= bound, "{what}: NMSE {error:.2e} above {bound:.0e}");
        assert!(sealed.get_or_insert_with(|| bytes.clone()) == &bytes, "{what}: sealed bytes differ");
    }
}

#[test]
fn every_width_and_form() {
    for width in ["1.6", "2", "3", "4", "8"] {
        for form in
            ["", ",group=64", ",group=128,rotate=0", ",group=head,mean=0", ",group=64,symmetric=1", ",clip=0.9,refit=0"]
        {
            let spec = format!("skvq:k={width},v={width}{form}").leak();
            check(&Case { spec, ..BASE });
        }
    }
    check(&Case { spec: "skvq:paper", ..BASE });
    check(&Case { spec: "skvq:k=2,v=2,group=32", ..BASE });
}

#[test]
fn keys_per_channel() {
    for k in ["1", "1.5", "2", "2.25", "2.75", "3.5", "4"] {
        for form in ["", ",meta=fp16"] {
            check(&Case { spec: format!("kivi:k={k}{form}").leak(), ..BASE });
        }
    }
    for spec in
        ["kivi:paper", "kivi:k=3,adaptive=0", "kivi:k=4,adaptive=0,v=4", "kivi:page=64", "kivi:page=256,window=9"]
    {
        check(&Case { spec, ..BASE });
    }
    for dim in [64, 96, 160, 256] {
        let shape = Shape { head_dim_k: dim, ..LLAMA };
        check(&Case { spec: "kivi:k=2.5", shape, ..BASE });
        check(&Case { spec: "kivi", shape, n_splits: 3, ..BASE });
    }
    check(&Case { spec: "kivi", shape: Shape { n_heads: 40, n_kv_heads: 1, ..LLAMA }, ..BASE });
}

#[test]
fn every_budget_of_tokens() {
    for bits in [1.0, 1.5, 2.0, 2.25, 2.5, 3.0, 3.5, 4.0] {
        check(&Case { spec: format!("qaq:bits={bits},min-bits=1").leak(), ..BASE });
    }
    for bits in [1, 2, 3, 4] {
        check(&Case { spec: format!("qaq:bits={bits},min-bits=1,levels=normal").leak(), ..BASE });
    }
    for spec in ["qaq:paper", "qaq:outliers=1,rotate=0", "qaq:adaptive=0", "qaq:bits=2.5,attn-keys=1"] {
        check(&Case { spec, ..BASE });
    }
    for spec in
        ["qaq:bits=2,page=64", "qaq:page=256,window=9", "qaq:attn-window=64,window=64,v=2.5", "qaq:symmetric=0,mean=0"]
    {
        check(&Case { spec, ubatches: &[300, 1, 64, 1, 7], n_cells: 512, ..BASE });
    }
    for (dim_k, dim_v) in [(64, 64), (96, 128), (256, 160)] {
        let shape = Shape { n_heads: 6, n_kv_heads: 2, head_dim_k: dim_k, head_dim_v: dim_v };
        check(&Case { spec: "qaq", shape, ..BASE });
        check(&Case { spec: "qaq", shape, n_splits: 3, ..BASE });
    }
    check(&Case { spec: "qaq", shape: Shape { n_heads: 40, n_kv_heads: 1, ..LLAMA }, ..BASE });
}

#[test]
fn outlier_tokens_are_read_once() {
    for spec in ["ott", "ott:paper", "ott:outliers=1,pool=0", "ott:outliers=6,pool=2,page=64,window=9", "ott:k=3,v=4"] {
        check(&Case { spec, ..BASE });
        check(&Case { spec, n_splits: 3, rewind: true, ..BASE });
        check(&Case { spec, layer: 0, ..BASE });
    }
}

#[test]
fn keys_and_values_have_their_own_width_and_head_size() {
    for (k, v) in [(64, 64), (64, 128), (96, 96), (160, 64), (192, 128), (224, 96), (256, 256)] {
        let shape = Shape { head_dim_k: k, head_dim_v: v, ..LLAMA };
        for spec in ["skvq:k=3,v=2", "skvq:k=2,v=1.6", "skvq:k=4,v=8,group=32"] {
            check(&Case { spec, shape, ..BASE });
        }
    }
}

#[test]
fn head_counts() {
    for (n_heads, n_kv_heads) in [(4, 4), (8, 1), (15, 3), (40, 1), (7, 1)] {
        check(&Case { shape: Shape { n_heads, n_kv_heads, ..LLAMA }, spec: "skvq:k=2,v=2", ..BASE });
    }
}

#[test]
fn logits_options() {
    check(&Case { softcap: 2.0, ..BASE });
    check(&Case { max_bias: 8.0, shape: Shape { n_heads: 12, ..LLAMA }, ..BASE });
    check(&Case { sinks: true, ..BASE });
    check(&Case { swa: 70, f16_mask: false, ..BASE });
    check(&Case { swa: 70, sinks: true, softcap: 3.0, n_splits: 3, ..BASE });
}

#[test]
fn sealed_pages_beyond_the_mask() {
    for f16_mask in [false, true] {
        check(&Case { rewind: true, f16_mask, ..BASE });
        check(&Case { rewind: true, f16_mask, spec: "skvq:window=0,sinks=0", n_splits: 4, ..BASE });
    }
}

#[test]
fn splits_windows_and_pages() {
    for n_splits in [2, 5, 16] {
        check(&Case { n_splits, ..BASE });
    }
    for spec in ["skvq:window=0,sinks=0", "skvq:window=32,page=64", "skvq:page=256,window=300", "skvq:window=1,sinks=9"]
    {
        check(&Case { spec, ..BASE });
        check(&Case { spec, n_cells: 333, ubatches: &[1, 292], n_splits: 2, ..BASE });
    }
}

#[test]
fn kernels_read_what_the_page_says_and_nothing_else() {
    // The check above compares with decoded rows; here the rows themselves are the truth: 8 bits must be close to exact.
    let case = Case { spec: "skvq:k=8,v=8,window=0,sinks=0", ..BASE };
    let recipe = Recipe::parse(case.spec).unwrap();
    let layout = Layout::new(&recipe, LLAMA, 0, 256, 256).unwrap();
    let mut region = vec![0u8; layout.head_bytes(Side::Key)];
    let mut rng = Rng::new(99);
    let rows = random_rows(&mut rng, 128, 128);
    let at: Vec<u32> = (0..128).collect();
    let seal = crate::codec::page::SealRows {
        place: None,
        at: &at,
        rows: &mut rows.clone(),
        fresh: true,
        exact: &[],
        channel_weights: &[],
        last_exponents: &mut [],
        attention: &[],
    };
    HeadMut::new(&layout, Side::Key, &mut region).seal(0, seal);
    let mut out = vec![0f32; 128 * 128];
    dequantize_head(&layout, Side::Key, &region, &[IN_ITS_PAGE; 256], None, 0..128, &mut out).unwrap();
    let truth: Vec<f64> = rows.iter().map(|x| f64::from(*x)).collect();
    let error = reference::nmse(&out, &truth);
    assert!(error <= 1e-4, "{error:.2e}");
}

#[test]
fn hostile_values_do_not_spread() {
    let recipe = Recipe::parse("skvq:window=0,sinks=0").unwrap();
    let layout = Layout::new(&recipe, LLAMA, 0, 256, 256).unwrap();
    let mut rng = Rng::new(5);
    let clean = random_rows(&mut rng, 128, 128);
    let mut dirty = clean.clone();
    dirty[7 * 128] = f32::NAN;
    dirty[9 * 128 + 3] = f32::INFINITY;
    let seal = |rows: &[f32]| {
        let mut region = vec![0u8; layout.head_bytes(Side::Value)];
        let at: Vec<u32> = (0..128).collect();
        let mut rows: Vec<f32> = rows.iter().map(|x| finite(*x)).collect();
        HeadMut::new(&layout, Side::Value, &mut region).seal(
            0,
            crate::codec::page::SealRows {
                place: None,
                at: &at,
                rows: &mut rows,
                fresh: true,
                exact: &[],
                channel_weights: &[],
                last_exponents: &mut [],
                attention: &[],
            },
        );
        let mut out = vec![0f32; 128 * 128];
        dequantize_head(&layout, Side::Value, &region, &[IN_ITS_PAGE; 256], None, 0..128, &mut out).unwrap();
        out
    };
    let out = seal(&dirty);
    assert!(out.iter().all(|x| x.is_finite()));
    // A row of ordinary size next to one of 65504 is still there, if coarser: its sign survives.
    let same = clean.iter().zip(&out).skip(20 * 128).filter(|(a, b)| a.signum() == b.signum()).count();
    assert!(same * 10 >= 108 * 128 * 7, "{same}");
}
