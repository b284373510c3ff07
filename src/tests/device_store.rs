//! The store step on a device against the scalar path: after every ubatch the same bytes everywhere, what was learned, the
//! ring of queries and the outlier pool included. Devices are those of `device.rs`.

use std::collections::BTreeSet;
use std::time::Instant;

use super::device_twin::{denominators, next_cells, spoil, Learns, Twin, POISON};
use super::layer::{recipes, Layer, Ubatch};
use super::random::Rng;
use crate::codec::page::Side;
use crate::cuda::attend::Workspace;
use crate::cuda::desc::StreamDesc;
use crate::cuda::lab::Lab;
use crate::cuda::store::{enqueue, workspace_bytes};
use crate::cuda::Call;
use crate::error::Status;
use crate::head::{Head, HeadMut};
use crate::plan::{Plan, Seal};
use crate::pool;
use crate::shape::Shape;

fn shape(n_kv_heads: u32, gqa: u32, head_dim_k: u32, head_dim_v: u32) -> Shape {
    Shape { n_heads: n_kv_heads * gqa, n_kv_heads, head_dim_k, head_dim_v }
}

/// What a walk has done.
#[derive(Default)]
struct Walked {
    /// Rows that were encoded.
    sealed: usize,
    /// Pages that were made anew.
    fresh: usize,
    /// Rows that were turned back first.
    turned: usize,
}

/// Random appends, removals and reuse of cells, with positions that move if `shifts`.
fn walk(lab: &Lab, spec: &str, shape: Shape, n_cells: usize, steps: usize, shifts: bool) -> Walked {
    let mut twin = Twin::new(lab, spec, shape, n_cells);
    if shifts {
        twin.rotate(shape.n_heads.is_multiple_of(2));
    }
    let page = twin.layer.layout.page();
    let mut rng = Rng::new(spec.len() as u64 * 7919 + u64::from(shape.n_heads) * 131 + u64::from(shape.head_dim_k));
    let (mut position, mut walked) = (0, Walked::default());
    for step in 0..steps {
        let cells = match step {
            // Enough for some pages first.
            0 => (0..2 * page + 40).collect(),
            1 => (2 * page + 40..3 * page).collect(),
            _ => next_cells(&mut rng, &mut twin.layer, page),
        };
        let ints = twin.layer.plan_cells(&cells, position);
        position += cells.len();
        let mut ubatch = twin.layer.ubatch(&mut rng, cells.len());
        spoil(&mut rng, &shape, &mut ubatch, step > 1);
        let lse = denominators(&mut rng, cells.len() * shape.n_heads as usize);
        let learns = [Learns::Everything, Learns::Everything, Learns::Queries, Learns::Nothing][rng.below(4)];
        let plan = Plan::new(&ints).unwrap();
        let fresh = plan.records().filter(|record| record.seal == Seal::Fresh).map(|record| record.cell / page);
        walked.sealed += plan.records().len();
        walked.fresh += fresh.collect::<BTreeSet<usize>>().len();
        walked.turned += plan.records().filter(|r| r.seal != Seal::Fresh && plan.turned(r.cell) != 0).count();
        if let Some(difference) = twin.store(&ints, &ubatch, &lse, learns) {
            panic!("{}: {spec} {shape:?} {n_cells} cells, step {step}, {} rows: {difference}", lab.name(), cells.len());
        }
        if shifts && step % 3 == 2 {
            twin.shift(&mut rng);
        }
    }
    walked
}

/// Walks through every recipe and prints what it did.
fn walk_all(specs: &[String], shapes: &[Shape], steps: usize) {
    for lab in Lab::all() {
        for spec in specs {
            for &shape in shapes.iter().filter(|shape| Layer::fits(spec, **shape)) {
                let (start, page) = (Instant::now(), Layer::page_of(spec));
                let Walked { sealed, fresh, .. } = walk(&lab, spec, shape, 5 * page + 11, steps, false);
                assert!(sealed > page && fresh > 1, "{spec}: {sealed} rows in {fresh} pages tell too little");
                let ms = start.elapsed().as_millis();
                let Shape { n_heads, n_kv_heads, head_dim_k, head_dim_v } = shape;
                println!(
                    "{:12} {spec:48} {n_heads:3}/{n_kv_heads} {head_dim_k:3}/{head_dim_v:3} {sealed:6} rows, {fresh:3} fresh pages, {ms:6} ms",
                    lab.name()
                );
            }
        }
    }
}

fn owned(specs: &[&str]) -> Vec<String> {
    specs.iter().map(|spec| spec.to_string()).collect()
}

#[test]
fn every_recipe() {
    walk_all(&recipes(&[]), &[shape(2, 2, 128, 128)], 12);
}

#[test]
fn every_width_and_form() {
    let group = ["skvq:k=8,v=8", "skvq:k=4,v=4", "skvq:k=3,v=3", "skvq:k=1.6,v=1.6", "skvq:k=2,v=2", "skvq:group=32"];
    let forms = ["skvq:smooth=0", "skvq:mean=0,rotate=0", "skvq:group=64,symmetric=0,k=4", "skvq:refit=0,clip=0.8"];
    let framed = ["aqua:k=1.5,v=1.6", "aqua:k=4,v=4,refit=0", "aqua:klt=0,bias=0", "aqua:predict=0,clip=0.8"];
    let channel = ["kivi:k=2.25", "kivi:k=1", "kivi:k=3.5,meta=fp16", "kivi:k=4,adaptive=0", "ott:k=2.5,outliers=6"];
    let adaptive = ["qaq:bits=3,attn-keys=1", "qaq:levels=normal", "qaq:outliers=2,symmetric=0,mean=0"];
    let more = ["qaq:bits=1.5,min-bits=1,levels=normal", "qaq:adaptive=0", "qaq:attn-window=0,mean=0"];
    let specs: Vec<String> =
        [&group[..], &forms, &framed, &channel, &adaptive, &more].concat().iter().map(|s| with_page(s, 64)).collect();
    walk_all(&specs, &[shape(1, 3, 64, 96)], 16);
}

fn with_page(spec: &str, page: usize) -> String {
    format!("{spec}{}page={page},window=32", if spec.contains(':') { "," } else { ":" })
}

#[test]
fn every_page_and_head_size() {
    for page in [64, 256] {
        let specs: Vec<String> =
            ["skvq:k=1.6,v=3", "skvq:symmetric=0,group=32", "kivi:k=2.5", "qaq", "ott:k=3,outliers=3,pool=4", "aqua"]
                .iter()
                .map(|spec| with_page(spec, page))
                .collect();
        walk_all(&specs, &[shape(1, 2, 96, 64), shape(1, 1, 256, 256), shape(2, 7, 64, 160)], 8);
    }
}

/// A window so small that rows of the ubatch itself are sealed, and ones that join pages.
#[test]
fn small_windows() {
    let specs =
        ["skvq:page=64,window=0,sinks=0", "kivi:page=64,window=5", "ott:page=64,window=0", "qaq:page=64,window=8"];
    walk_all(&owned(&specs), &[shape(1, 2, 64, 64)], 40);
    walk_all(&owned(&["aqua:page=64,window=0,sinks=0"]), &[shape(2, 2, 64, 96)], 40);
}

/// Pages of few rows that are made anew when others join, from what the outlier pool has of them as well.
#[test]
fn pages_of_few_rows() {
    let specs = [
        "skvq:page=64,window=0,sinks=0",
        "kivi:k=2.25,page=64,window=0,sinks=0",
        "ott:k=2.5,page=64,window=0,sinks=0,outliers=6,pool=8",
        "qaq:page=64,window=0,sinks=0,outliers=1,attn-window=0",
        "aqua:page=64,window=0,sinks=0",
    ];
    let page = 64;
    for lab in Lab::all() {
        for (spec, n_first) in specs.iter().flat_map(|spec| [1, 7, 15].map(|n| (spec, n))) {
            let mut twin = Twin::new(&lab, spec, shape(1, 2, 64, 64), 4 * page);
            twin.rotate(n_first == 7);
            let (mut rng, mut renewed, mut turned) = (Rng::new(n_first as u64), 0, 0);
            // As in `joined_rows`: page 0 is sealed when more is exact than the slots hold.
            let steps =
                [0..page - 1, page..2 * page - 1, 2 * page..2 * page + 4, n_first..page - 1, 3 * page..4 * page - 1];
            for (step, cells) in steps.into_iter().enumerate() {
                match step {
                    1 => twin.layer.live()[n_first..page].fill(false),
                    3 => twin.shift(&mut rng),
                    _ => {}
                }
                let cells: Vec<usize> = cells.collect();
                let ints = twin.layer.plan_cells(&cells, 10);
                let mut ubatch = twin.layer.ubatch(&mut rng, cells.len());
                spoil(&mut rng, &shape(1, 2, 64, 64), &mut ubatch, true);
                let lse = denominators(&mut rng, 2 * cells.len());
                let plan = Plan::new(&ints).unwrap();
                for record in plan.records().filter(|record| record.seal == Seal::Renew) {
                    renewed += 1;
                    turned += usize::from(plan.turned(record.cell) != 0);
                }
                let difference = twin.store(&ints, &ubatch, &lse, Learns::Everything);
                assert_eq!(difference, None, "{}: {spec}, {n_first} rows first, step {step}", lab.name());
            }
            assert!(renewed > 40 && turned > 40, "{spec}: {renewed} rows, {turned} turned, tell too little");
        }
    }
}

/// A pool that a crafted state brings: named twice, a member stays once.
#[test]
fn members_that_are_named_twice() {
    let spec = "ott:page=64,window=0,sinks=0,outliers=4,pool=8";
    for lab in Lab::all() {
        let mut twin = Twin::new(&lab, spec, shape(1, 1, 64, 64), 256);
        let mut rng = Rng::new(3);
        for cells in [0..128, 128..129] {
            if cells.start > 0 {
                for side in [Side::Key, Side::Value] {
                    let mut head = HeadMut::new(&twin.layer.layout, side, &mut twin.layer.memory[side as usize]);
                    let first = pool::cells(head.as_ref()).flatten().next();
                    [7, 10, 11].into_iter().for_each(|row| pool::set_cell(&mut head, row, first));
                }
                twin.memory = twin.layer.memory.each_ref().map(|side| lab.upload(side));
            }
            let n = cells.len();
            let (ints, ubatch) = (twin.layer.plan(cells), twin.layer.ubatch(&mut rng, n));
            assert_eq!(twin.store(&ints, &ubatch, &vec![1.0; n], Learns::Everything), None, "{}", lab.name());
            let key = Head::new(&twin.layer.layout, Side::Key, &twin.layer.memory[0]);
            let members: Vec<usize> = pool::cells(key).flatten().collect();
            let distinct: BTreeSet<usize> = members.iter().copied().collect();
            assert!(members.len() >= 4 && distinct.len() == members.len(), "{members:?}");
        }
    }
}

/// Rows that join a page whose positions have moved since it was sealed.
#[test]
fn rows_are_turned_back() {
    for lab in Lab::all() {
        for (spec, shape) in [
            ("skvq:page=64,window=0", shape(1, 2, 64, 64)),
            ("kivi:page=64,window=8", shape(1, 3, 96, 64)),
            ("aqua:page=64,window=8", shape(1, 3, 96, 64)),
        ] {
            let walked = walk(&lab, spec, shape, 331, 60, true);
            assert!(walked.turned > 20, "{spec}: {} rows tell too little", walked.turned);
        }
    }
}

/// Streams that hold different amounts of different rows store in one call what each would store alone, and are decoded in one.
#[test]
fn several_streams() {
    const N_CELLS: usize = 640;
    for lab in Lab::all() {
        // Rows of the last one fit no shared memory.
        for (spec, shape, n) in [
            ("on", shape(2, 2, 64, 64), 1),
            ("on", shape(1, 4, 128, 128), 300),
            ("qaq", shape(2, 1, 64, 96), 140),
            ("aqua", shape(2, 2, 64, 64), 1),
            ("aqua", shape(2, 1, 128, 64), 300),
            ("skvq:page=256", shape(1, 1, 256, 256), 200),
        ] {
            let mut rng = Rng::new(11);
            let mut twins = [310, 20, 140].map(|held| {
                let mut twin = Twin::new(&lab, spec, shape, N_CELLS);
                // Each stream has positions of its own.
                let ints = twin.layer.plan_cells(&(0..held).collect::<Vec<usize>>(), 5 * held);
                let ubatch = twin.layer.ubatch(&mut rng, held);
                let lse = vec![1.5; held * shape.n_heads as usize];
                assert_eq!(twin.store(&ints, &ubatch, &lse, Learns::Everything), None);
                let ints = twin.layer.plan_cells(&(held..held + n).collect::<Vec<usize>>(), 6 * held);
                (ints, twin.layer.ubatch(&mut rng, n), vec![2.5; n * shape.n_heads as usize], twin)
            });
            let all = |of: &dyn Fn(&Ubatch) -> &Vec<f32>| {
                lab.upload(&twins.iter().flat_map(|twin| of(&twin.1).clone()).collect::<Vec<f32>>())
            };
            let ints: Vec<i32> = twins.iter().flat_map(|twin| twin.0.clone()).collect();
            let lse: Vec<f32> = twins.iter().flat_map(|twin| twin.2.clone()).collect();
            let positions: Vec<i32> = twins.iter().flat_map(|twin| twin.3.layer.positions().to_vec()).collect();
            let (plan, positions) = (lab.upload(&ints), lab.upload(&positions));
            let rows = [all(&|u| &u.q), all(&|u| &u.k), all(&|u| &u.v), lab.upload(&lse), plan, positions];
            let memory = [0, 1].map(|side: usize| {
                lab.upload(&twins.iter().flat_map(|twin| twin.3.layer.memory[side].clone()).collect::<Vec<u8>>())
            });
            let (layout, plan_len) = (&twins[0].3.layer.layout, twins[0].0.len());
            let mut call = twins[0].3.call(&rows, &twins[0].0, Learns::Everything);
            (call.call.k_mem, call.call.v_mem) = (memory[0].pointer().cast(), memory[1].pointer().cast());
            let (k, v) = (layout.k_bytes() as u64, layout.v_bytes() as u64);
            call.call.streams =
                StreamDesc { k, v, plan: plan_len as u64, positions: N_CELLS as u64, ..StreamDesc::default() };
            let call = Call { n_streams: 3, ..call };
            let bytes = workspace_bytes(lab.device(), layout, n as u32, 3);
            let space = lab.upload(&vec![POISON; bytes]);
            let workspace = Workspace { memory: space.pointer(), bytes };
            // SAFETY: as in `Twin::store`.
            unsafe { enqueue(lab.device(), layout, call, workspace, std::ptr::null_mut()).unwrap() };
            let got = memory.each_ref().map(|side| lab.download::<u8>(side));
            for (i, (ints, ubatch, lse, twin)) in twins.iter_mut().enumerate() {
                twin.layer.store_learning(ints, ubatch, true, Some(lse));
                for (want, got) in twin.layer.memory.iter().zip(&got) {
                    let got = &got[i * want.len()..][..want.len()];
                    let differ = want.iter().zip(got).filter(|(a, b)| a != b).count();
                    assert_eq!(differ, 0, "{}: {spec}, stream {i} of {n} rows", lab.name());
                }
            }
        }
    }
}

#[test]
fn too_little_workspace_and_short_plans_are_refused() {
    for lab in Lab::all() {
        // Rows of such pages fit no shared memory.
        let mut twin = Twin::new(&lab, "skvq:page=256", shape(1, 1, 256, 256), 512);
        let ints = twin.layer.plan(0..3);
        let rows = [(); 6].map(|()| lab.upload(&[0f32; 4096]));
        let bytes = workspace_bytes(lab.device(), &twin.layer.layout, 3, 1);
        let given = Workspace { memory: twin.workspace.pointer(), bytes };
        assert!((256 * 256 * 4..=twin.workspace.bytes()).contains(&bytes));
        let short = Workspace { bytes: given.bytes - 1, ..given };
        for (workspace, len, status) in
            [(short, ints.len(), Status::BufferTooSmall), (given, ints.len() - 1, Status::InvalidArgument)]
        {
            let call = Call { plan_len: len, ..twin.call(&rows, &ints, Learns::Nothing) };
            // SAFETY: nothing is enqueued.
            let refused = unsafe { enqueue(lab.device(), &twin.layer.layout, call, workspace, std::ptr::null_mut()) };
            assert_eq!(refused.unwrap_err().status(), status);
        }
    }
}
