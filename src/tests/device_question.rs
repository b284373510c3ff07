//! A layer's attention as a question to a device and to the CPU.

use std::ffi::c_void;
use std::time::Instant;

use super::layer::{Layer, Ubatch};
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

/// Output rows and the logarithms of their denominators.
pub(super) type Answer = (Vec<f32>, Vec<f32>);

/// Largest normalized error against the scalar path.
pub(super) const NMSE: f64 = 1e-5;
pub(super) const SCALE: f32 = 0.1;

#[derive(Clone, Copy, PartialEq)]
pub(super) enum MaskKind {
    None,
    F16,
    F32,
}

/// How attention is asked.
#[derive(Clone, Copy)]
pub(super) struct Asked {
    pub(super) mask: MaskKind,
    pub(super) softcap: f32,
    pub(super) max_bias: f32,
    pub(super) sink_logits: bool,
    /// The view after the store, without rows of the ubatch.
    pub(super) stored: bool,
    /// Columns that the mask lacks.
    pub(super) short: usize,
    /// Positions have moved, rows of a page by several distances.
    pub(super) turned: bool,
    /// Channels of keys change in size from ubatch to ubatch, so that pages have factors of their own.
    pub(super) uneven: bool,
}

pub(super) const PLAIN: Asked = Asked {
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
pub(super) fn mask_of(rng: &mut Rng, n_tokens: usize, n_kv: usize) -> Vec<f32> {
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
pub(super) struct Given<'a> {
    pub(super) ints: &'a [i32],
    pub(super) ubatch: &'a Ubatch,
    pub(super) mask: &'a [f32],
    pub(super) half: &'a [u16],
    pub(super) sinks: &'a [f32],
    pub(super) n_kv: usize,
}

pub(super) struct Question<'a> {
    pub(super) layer: &'a Layer,
    /// The same layout with scalar kernels.
    pub(super) scalar: &'a Layout,
    pub(super) given: Given<'a>,
    pub(super) asked: Asked,
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
    pub(super) fn on_cpu(&self, layout: &Layout) -> Answer {
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
    pub(super) fn on(streams: &[Self], lab: &Lab, workspace: &mut Option<Buffer>) -> Vec<Answer> {
        Self::timed(streams, lab, workspace, 0).0
    }

    /// The same, and the microseconds of a call if it is made `n_calls` times more.
    pub(super) fn timed(
        streams: &[Self],
        lab: &Lab,
        workspace: &mut Option<Buffer>,
        n_calls: u32,
    ) -> (Vec<Answer>, f64) {
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
        let profile = lab.upload(&layout.profile());
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
                ..StreamDesc::default()
            },
            // SAFETY: numbers and pointers, for which zero is a value.
            ..unsafe { std::mem::zeroed() }
        };
        let rotation = streams[0].rotation().map_or(RotationDesc::default(), |rotation| rotation.describe());
        let call = Call {
            call,
            rotation,
            n_streams: n_streams as u32,
            plan_len: given.ints.len(),
            profile: profile.pointer() as u64,
        };
        let memory: *mut c_void = workspace.pointer();
        let workspace = Workspace { memory, bytes: workspace.bytes() };
        // SAFETY: every pointer is a buffer of the device that holds what the header says and outlives the downloads, which
        // wait for the kernel.
        let ask = || unsafe { enqueue(lab.device(), layout, call, workspace, std::ptr::null_mut()).unwrap() };
        ask();
        lab.download::<f32>(&sinks);
        let start = Instant::now();
        (0..n_calls).for_each(|_| ask());
        let (out, lse) = (lab.download(&out), lab.download(&lse));
        let microseconds = start.elapsed().as_secs_f64() * 1e6 / f64::from(n_calls.max(1));
        let of_each = out.chunks(n_rows * shape.head_dim_v as usize).zip(lse.chunks(n_rows));
        (of_each.map(|(out, lse)| (out.to_vec(), lse.to_vec())).collect(), microseconds)
    }

    /// Compares what a device says with the scalar path; gives the error.
    pub(super) fn check(&self, got: &Answer, what: &str) -> f64 {
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
pub(super) fn joined<'a, T: Copy + 'a>(
    streams: &'a [Question<'a>],
    of: impl Fn(&'a Question<'a>) -> &'a [T],
) -> Vec<T> {
    streams.iter().flat_map(|stream| of(stream).iter().copied()).collect()
}
