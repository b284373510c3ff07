//! Attention on a device against the scalar path, for every codec, width, head size and way to be asked. Devices are the
//! emulation (feature `cuda-emulation`) and the first GPU (feature `cuda`), where there is one.

use std::ffi::c_void;

use super::layer::{device_recipes, Layer, Ubatch};
use super::random::Rng;
use crate::attention::{attend, AttendArgs, Mask};
use crate::cuda::attend::{enqueue, workspace_bytes, Size, Workspace};
use crate::cuda::desc::{AttendCall, RotationDesc, StreamDesc};
use crate::cuda::lab::{Buffer, Lab};
use crate::cuda::Call;
use crate::layout::Layout;
use crate::plan::Plan;
use crate::reference;
use crate::rotation::Rotation;
use crate::rows::Rows;
use crate::shape::Shape;
use crate::simd::isa::{Isa, IsaToken};

/// Largest normalized error against the scalar path.
const NMSE: f64 = 1e-5;
const SCALE: f32 = 0.1;

#[derive(Clone, Copy, PartialEq)]
enum MaskKind {
    None,
    F16,
    F32,
}

/// How attention is asked.
#[derive(Clone, Copy)]
struct Asked {
    mask: MaskKind,
    softcap: f32,
    max_bias: f32,
    sink_logits: bool,
    /// The view after the store, without rows of the ubatch.
    stored: bool,
    /// Columns that the mask lacks.
    short: usize,
    /// Positions have moved, rows of a page by several distances.
    turned: bool,
    /// Channels of keys change in size from ubatch to ubatch, so that pages have factors of their own.
    uneven: bool,
}

const PLAIN: Asked = Asked {
    mask: MaskKind::F16,
    softcap: 0.0,
    max_bias: 0.0,
    sink_logits: false,
    stored: false,
    short: 0,
    turned: false,
    uneven: false,
};

/// What a mask says: some cells hidden, by token, some weighed.
fn mask_of(rng: &mut Rng, n_tokens: usize, n_kv: usize) -> Vec<f32> {
    (0..n_tokens * n_kv)
        .map(|i| match (i % n_kv / 7 + i / n_kv) % 9 {
            3 => f32::NEG_INFINITY,
            5 => -0.5 - (rng.bits() % 4) as f32 * 0.25,
            _ => 0.0,
        })
        .collect()
}

/// What an ubatch comes with.
#[derive(Clone, Copy)]
struct Given<'a> {
    ints: &'a [i32],
    ubatch: &'a Ubatch,
    mask: &'a [f32],
    half: &'a [u16],
    sinks: &'a [f32],
    n_kv: usize,
}

struct Question<'a> {
    layer: &'a Layer,
    /// The same layout with scalar kernels.
    scalar: &'a Layout,
    given: Given<'a>,
    asked: Asked,
}

impl Question<'_> {
    fn rows(&self) -> [Rows<'_>; 3] {
        self.layer.rows(self.given.ubatch)
    }

    fn rotation(&self) -> Option<Rotation> {
        let n = self.layer.layout.shape().head_dim_k as usize / 2 - 3;
        let frequencies: Vec<f64> = (0..n).map(|pair| 0.3f64.powf(pair as f64 / n as f64 * 6.0)).collect();
        self.asked.turned.then(|| Rotation::new(&frequencies, self.given.sinks.len().is_multiple_of(4)).unwrap())
    }

    /// Output and denominators on the CPU.
    fn on_cpu(&self, layout: &Layout) -> (Vec<f32>, Vec<f32>) {
        let shape = self.layer.layout.shape();
        let [q, k, v] = self.rows();
        let plan = Plan::new(self.given.ints).unwrap();
        let rotation = self.rotation();
        let args = AttendArgs {
            rotation: rotation.as_ref(),
            q,
            current: (!self.asked.stored).then_some((k, v)),
            k_mem: &self.layer.memory[0],
            v_mem: &self.layer.memory[1],
            plan,
            mask: match self.asked.mask {
                MaskKind::None => Mask::None,
                MaskKind::F16 => Mask::F16(self.given.half),
                MaskKind::F32 => Mask::F32(self.given.mask),
            },
            mask_stride_token: self.given.n_kv,
            n_kv: self.given.n_kv,
            sink_logits: self.asked.sink_logits.then_some(self.given.sinks),
            scale: SCALE,
            softcap: self.asked.softcap,
            max_bias: self.asked.max_bias,
            n_tokens: plan.n_tokens(),
            n_splits: 1,
            with_lse: true,
        };
        let n_rows = plan.n_tokens() * shape.n_heads as usize;
        let mut out = vec![f32::NAN; n_rows * (shape.head_dim_v as usize + 1)];
        attend(layout, &args, 0, 1, &mut |at, row| out[at..at + row.len()].copy_from_slice(row)).unwrap();
        let lse = out.split_off(n_rows * shape.head_dim_v as usize);
        (out, lse)
    }

    /// What a device does with the questions of several streams in one call, which differ in what the streams hold:
    /// outputs and denominators of each, and the workspace to be used again.
    fn on(streams: &[Self], lab: &Lab, workspace: &mut Option<Buffer>) -> Vec<(Vec<f32>, Vec<f32>)> {
        let Self { layer: Layer { layout, .. }, given, asked, .. } = &streams[0];
        let (shape, n_streams) = (layout.shape(), streams.len());
        let n_tokens = Plan::new(given.ints).unwrap().n_tokens();
        let n_rows = n_tokens * shape.n_heads as usize;
        let size = Size { n_tokens: n_tokens as u32, n_streams: n_streams as u32, n_kv: given.n_kv as u32 };
        let bytes = workspace_bytes(lab.device(), layout, size).unwrap();
        if workspace.as_ref().is_none_or(|buffer| buffer.bytes() < bytes) {
            *workspace = Some(lab.upload(&vec![0u8; bytes]));
        }
        let workspace = workspace.as_ref().unwrap();
        let rows = [0, 1, 2].map(|i| lab.upload(&joined(streams, |stream| stream.rows()[i].data)));
        let mask = match asked.mask {
            MaskKind::None => None,
            MaskKind::F16 => Some(lab.upload(&joined(streams, |stream| stream.given.half))),
            MaskKind::F32 => Some(lab.upload(&joined(streams, |stream| stream.given.mask))),
        };
        let memory = [0, 1].map(|side| lab.upload(&joined(streams, |stream| &stream.layer.memory[side])));
        let plan = lab.upload(&joined(streams, |stream| stream.given.ints));
        let sinks = lab.upload(given.sinks);
        let out = lab.upload(&vec![f32::NAN; n_streams * n_rows * shape.head_dim_v as usize]);
        let lse = lab.upload(&vec![f32::NAN; n_streams * n_rows]);
        let current = |buffer: &Buffer| if asked.stored { std::ptr::null() } else { buffer.pointer().cast() };
        let [q, k, v] = streams[0].rows();
        let call = AttendCall {
            q: rows[0].pointer().cast(),
            q_stride_token: q.stride_token as u64,
            q_stride_head: q.stride_head as u64,
            k_cur: current(&rows[1]),
            k_stride_token: k.stride_token as u64,
            k_stride_head: k.stride_head as u64,
            v_cur: current(&rows[2]),
            v_stride_token: v.stride_token as u64,
            v_stride_head: v.stride_head as u64,
            k_mem: memory[0].pointer().cast(),
            v_mem: memory[1].pointer().cast(),
            plan: plan.pointer().cast(),
            mask: mask.as_ref().map_or(std::ptr::null(), |buffer| buffer.pointer().cast()),
            mask_stride_token: given.n_kv as u64,
            sink_logits: if asked.sink_logits { sinks.pointer().cast() } else { std::ptr::null() },
            out: out.pointer().cast(),
            lse: lse.pointer().cast(),
            mask_is_f16: (asked.mask == MaskKind::F16).into(),
            n_kv: given.n_kv as u32,
            scale: SCALE,
            softcap: asked.softcap,
            max_bias: asked.max_bias,
            n_tokens: n_tokens as u32,
            streams: StreamDesc {
                k: layout.k_bytes() as u64,
                v: layout.v_bytes() as u64,
                plan: given.ints.len() as u64,
                mask: given.mask.len() as u64,
                partial: 0,
            },
            // SAFETY: numbers and pointers, for which zero is a value.
            ..unsafe { std::mem::zeroed() }
        };
        let rotation = streams[0].rotation().map_or(RotationDesc::default(), |rotation| rotation.describe());
        let call = Call { call, rotation, n_streams: n_streams as u32, plan_len: given.ints.len() };
        let memory: *mut c_void = workspace.pointer();
        // SAFETY: every pointer is a buffer of the device that holds what the header says and outlives the download, which
        // waits for the kernel.
        unsafe {
            let workspace = Workspace { memory, bytes: workspace.bytes() };
            enqueue(lab.device(), layout, call, workspace, std::ptr::null_mut()).unwrap();
        }
        let (out, lse) = (lab.download(&out), lab.download(&lse));
        let of_each = out.chunks(n_rows * shape.head_dim_v as usize).zip(lse.chunks(n_rows));
        of_each.map(|(out, lse)| (out.to_vec(), lse.to_vec())).collect()
    }

    /// Compares what a device says with the scalar path; gives the error.
    fn check(&self, got: &(Vec<f32>, Vec<f32>), what: &str) -> f64 {
        let (want, want_lse) = self.on_cpu(self.scalar);
        let truth: Vec<f64> = want.iter().map(|x| f64::from(*x)).collect();
        let error = reference::nmse(&got.0, &truth);
        let far = |a: f32, b: f32| !((a - b).abs() <= 2e-3 || a == b);
        let lse = want_lse.iter().zip(&got.1).position(|(a, b)| far(*a, *b));
        assert!(error <= NMSE, "{what}: error {error:.2e}");
        assert!(lse.is_none(), "{what}: lse of row {lse:?}: {want_lse:?} {:?}", got.1);
        error
    }
}

/// What each stream has, one after the other.
fn joined<'a, T: Copy + 'a>(streams: &'a [Question<'a>], of: impl Fn(&'a Question<'a>) -> &'a [T]) -> Vec<T> {
    streams.iter().flat_map(|stream| of(stream).iter().copied()).collect()
}

/// Says of a plan that rows of the first pages have moved since they were encoded: by two distances, and some not at all.
fn turn_pages(ints: &mut [i32], layer: &Layer) {
    let plan = Plan::new(ints).unwrap();
    let at = crate::plan::describe(plan.n_tokens(), plan.n_slots(), plan.n_cells(), plan.page());
    let turns = [(0, 17, 0x0f0f_00ff), (0, -40_000, 0xf000_ff00u32 as i32), (1, 3, -1)];
    ints[at.n_turns as usize] = turns.len() as i32;
    for (i, (page, distance, cells)) in turns.into_iter().enumerate() {
        let turn = &mut ints[at.turns as usize + i * at.turn_ints as usize..][..2 + layer.layout.page() / 32];
        turn.fill(cells);
        (turn[0], turn[1]) = (page, distance);
    }
}

/// Feeds a layer ubatches and compares attention at each of them; gives the worst error.
fn compare(lab: &Lab, spec: &str, shape: Shape, n_cells: usize, ubatches: &[usize], asked: Asked) -> f64 {
    let mut layer = Layer::new(spec, shape, n_cells, IsaToken::detect().unwrap());
    let scalar = IsaToken::new(Isa::Scalar).unwrap();
    let scalar = Layer::new(spec, shape, n_cells, scalar).layout;
    let mut rng = Rng::new(spec.len() as u64 + u64::from(shape.n_heads) * 131 + n_cells as u64);
    let (mut at, mut worst, mut workspace) = (0, 0f64, None);
    for (i, &n) in ubatches.iter().enumerate() {
        let plan = layer.plan(at..at + n);
        let mut ints = plan.clone();
        if asked.turned {
            turn_pages(&mut ints, &layer);
        }
        at += n;
        let mut ubatch = layer.ubatch(&mut rng, n);
        if asked.uneven {
            let channels = ubatch.k.iter_mut().enumerate();
            channels.for_each(|(at, x)| *x *= [0.05, 4.0, 1.0][(at % shape.head_dim_k as usize * (i + 3) / 7) % 3]);
        }
        let n_kv = at.next_multiple_of(64).min(n_cells).saturating_sub(asked.short).max(1);
        let mask = mask_of(&mut rng, n, n_kv);
        let half: Vec<u16> = mask.iter().map(|x| half::f16::from_f32(*x).to_bits()).collect();
        let sinks = rng.values(shape.n_heads as usize);
        let given = Given { ints: &ints, ubatch: &ubatch, mask: &mask, half: &half, sinks: &sinks, n_kv };
        let mut check = |question: Question| {
            let what = format!("{}: {spec} {shape:?} {n_cells} cells, ubatch {i} of {ubatches:?}", lab.name());
            let question = [question];
            let got = Question::on(&question, lab, &mut workspace);
            worst = worst.max(question[0].check(&got[0], &what));
        };
        if !asked.stored && n <= 64 {
            check(Question { layer: &layer, scalar: &scalar, given, asked });
        }
        let (_, lse) = Question { layer: &layer, scalar: &scalar, given, asked: Asked { stored: false, ..asked } }
            .on_cpu(&layer.layout);
        layer.store(&plan, &ubatch, &lse);
        if asked.stored && i + 1 == ubatches.len() {
            check(Question { layer: &layer, scalar: &scalar, given, asked });
        }
    }
    worst
}

fn shape(n_kv_heads: u32, gqa: u32, head_dim_k: u32, head_dim_v: u32) -> Shape {
    Shape { n_heads: n_kv_heads * gqa, n_kv_heads, head_dim_k, head_dim_v }
}

/// Enough for sealed pages, a window and rows of the ubatch; the last but one ends inside a page.
const UBATCHES: &[usize] = &[430, 7, 1];

#[test]
fn every_recipe_and_width() {
    let more = ["skvq:k=8,v=8", "skvq:k=4,v=4", "skvq:k=3,v=3", "skvq:k=1.6,v=1.6", "skvq:k=2,v=2", "skvq:group=32"];
    let more = [&more[..], &["skvq:smooth=0", "skvq:mean=0,rotate=0", "skvq:group=64,symmetric=0,mean=0,k=4"]].concat();
    let more = [&more[..], &["kivi:k=2.25", "kivi:k=1", "kivi:k=3.5,meta=fp16", "kivi:k=4,adaptive=0"]].concat();
    let more = [&more[..], &["qaq:bits=3", "qaq:levels=normal", "qaq:outliers=2,symmetric=0,mean=0,smooth=0"]].concat();
    let more = [&more[..], &["qaq:bits=1.5,min-bits=1,levels=normal", "skvq:page=64", "kivi:k=3,page=256"]].concat();
    for lab in Lab::all() {
        for spec in device_recipes(&more) {
            compare(&lab, &spec, shape(2, 4, 128, 128), 640, UBATCHES, PLAIN);
        }
    }
}

#[test]
fn head_sizes_and_ratios() {
    for lab in Lab::all() {
        for spec in ["skvq:k=2,v=1.6", "on", "qaq"] {
            for shape in [
                shape(1, 1, 64, 64),
                shape(2, 7, 64, 96),
                shape(1, 8, 256, 256),
                shape(1, 9, 96, 64),
                shape(1, 2, 160, 224),
            ] {
                if Layer::fits(spec, shape) {
                    compare(&lab, spec, shape, 640, UBATCHES, PLAIN);
                }
            }
        }
    }
}

#[test]
fn fill_levels() {
    for lab in Lab::all() {
        for spec in ["2", "on", "qaq:bits=2.25", "ott"] {
            for ubatches in [&[1][..], &[20], &[256, 5], &[600, 16], &[900, 2]] {
                compare(&lab, spec, shape(1, 4, 128, 128), 1000, ubatches, PLAIN);
            }
        }
    }
}

#[test]
fn factors_that_change_from_page_to_page() {
    for lab in Lab::all() {
        for spec in ["skvq:k=2,v=2", "skvq:k=3,v=3", "skvq:k=4,v=4", "skvq:k=2,v=3,page=64"] {
            for mask in [MaskKind::None, MaskKind::F16] {
                let asked = Asked { mask, uneven: true, ..PLAIN };
                compare(&lab, spec, shape(2, 4, 128, 128), 1024, &[300, 300, 200, 2], asked);
            }
        }
    }
}

#[test]
fn ways_to_ask() {
    let f32_mask = Asked { mask: MaskKind::F32, ..PLAIN };
    let ways = [
        Asked { mask: MaskKind::None, ..PLAIN },
        f32_mask,
        Asked { softcap: 5.0, ..PLAIN },
        Asked { max_bias: 8.0, ..f32_mask },
        Asked { sink_logits: true, ..PLAIN },
        Asked { stored: true, ..PLAIN },
        Asked { stored: true, mask: MaskKind::None, sink_logits: true, softcap: 20.0, ..PLAIN },
        Asked { short: 70, ..PLAIN },
        Asked { turned: true, ..PLAIN },
    ];
    for lab in Lab::all() {
        for spec in ["2", "on", "qaq", "ott:sinks=0"] {
            for asked in ways {
                compare(&lab, spec, shape(2, 3, 64, 128), 640, UBATCHES, asked);
            }
        }
    }
}

/// Streams that hold different amounts of different rows, and are asked in one call.
#[test]
fn several_streams() {
    const N_CELLS: usize = 640;
    let shape = shape(2, 4, 64, 64);
    for lab in Lab::all() {
        for (spec, n, asked) in [
            ("skvq:k=2,v=2", 1, PLAIN),
            ("on", 2, PLAIN),
            ("qaq", 1, Asked { mask: MaskKind::F32, ..PLAIN }),
            ("kivi", 3, Asked { turned: true, ..PLAIN }),
            ("on", 1, Asked { mask: MaskKind::None, ..PLAIN }),
        ] {
            let scalar = Layer::new(spec, shape, N_CELLS, IsaToken::new(Isa::Scalar).unwrap()).layout;
            let mut rng = Rng::new(7);
            let given = [600, 40, 330].map(|held| {
                let mut layer = Layer::new(spec, shape, N_CELLS, IsaToken::detect().unwrap());
                let (ints, ubatch) = (layer.plan(0..held), layer.ubatch(&mut rng, held));
                let (_, lse) = layer.attend(&ints, &ubatch, 1, None);
                layer.store(&ints, &ubatch, &lse);
                let mut ints = layer.plan(held..held + n);
                if asked.turned {
                    turn_pages(&mut ints, &layer);
                }
                let mask = mask_of(&mut rng, n, N_CELLS);
                let half: Vec<u16> = mask.iter().map(|x| half::f16::from_f32(*x).to_bits()).collect();
                let ubatch = layer.ubatch(&mut rng, n);
                (layer, ints, ubatch, mask, half)
            });
            let streams: Vec<_> = given
                .iter()
                .map(|(layer, ints, ubatch, mask, half)| Question {
                    layer,
                    scalar: &scalar,
                    given: Given { ints, ubatch, mask, half, sinks: &[0.0; 8], n_kv: N_CELLS },
                    asked,
                })
                .collect();
            let got = Question::on(&streams, &lab, &mut None);
            for (i, (stream, got)) in streams.iter().zip(&got).enumerate() {
                stream.check(got, &format!("{}: {spec}, stream {i}", lab.name()));
            }
        }
    }
}
