//! Random and directed sequences of cache operations against the model, and refused arguments.
#![forbid(unsafe_code)]

mod model;

use super::*;
use crate::error::Status;
use crate::plan::{self, plan_len, Plan};
use crate::tests::random::Rng;
use model::{Model, NewRow};

const SMALL: PlannerConfig = PlannerConfig {
    n_cells: 256,
    page: 32,
    window: 40,
    sink_tokens: 2,
    n_streams: 1,
    n_seq_max: 3,
    seal_lag: 0,
    frees_early: false,
    outliers: 0,
};

fn random_config(rng: &mut Rng) -> PlannerConfig {
    let n_streams = 1 + 2 * rng.below(2);
    PlannerConfig {
        n_cells: 64 + rng.below(449),
        page: [32, 32, 64, 128][rng.below(4)],
        window: [0, rng.below(20), rng.below(200)][rng.below(3)],
        sink_tokens: rng.below(6),
        n_streams,
        n_seq_max: 3,
        seal_lag: [0, 1 + rng.below(100)][rng.below(2)],
        frees_early: rng.below(2) == 1,
        outliers: 0,
    }
}

/// Like the host's search: from a moving head over free cells, or any free cells; now and then a live cell, which a
/// sliding-window cache overwrites.
fn choose_cells(model: &mut Model, stream: usize, wanted: usize, rng: &mut Rng) -> Vec<usize> {
    let host = &mut model.streams[stream];
    let n_cells = host.cells.len();
    let overwrite = rng.below(20) == 0;
    let is_free = |cell: &usize| overwrite || host.cells[*cell].is_none();
    if rng.below(3) == 0 {
        let free: Vec<usize> = (0..n_cells).filter(is_free).collect();
        let n = wanted.min(free.len());
        return rng.choose(free, n);
    }
    let start = [host.head, 0][rng.below(2)];
    let cells: Vec<usize> = (start..n_cells).chain(0..start).filter(is_free).take(wanted).collect();
    host.head = cells.last().map_or(0, |cell| (cell + 1) % n_cells);
    cells
}

fn append(model: &mut Model, stream: usize, next_pos: &mut [i32], rng: &mut Rng) {
    let PlannerConfig { page, n_streams, n_seq_max, .. } = *model.planner.config();
    let wanted = [1, 1, rng.below(9), 1 + rng.below(3 * page)][rng.below(4)];
    let cells = choose_cells(model, stream, wanted, rng);
    let only = rng.below(n_seq_max);
    let interleaved = rng.below(2) == 0;
    let mut rows = Vec::new();
    for cell in cells {
        let seq = match (n_streams, interleaved) {
            (1, true) => rng.below(n_seq_max),
            (1, false) => only,
            _ => 0,
        };
        rows.push(NewRow { cell, pos: next_pos[seq], seqs: 1 << seq });
        next_pos[seq] += 1;
    }
    model.append(stream, &rows);
}

/// seq_rm: of one or all sequences, over a range of positions.
fn remove(model: &mut Model, stream: usize, seqs: u32, from: i32, to: i32) {
    for cell in &mut model.streams[stream].cells {
        if let Some(token) = cell.as_mut().filter(|token| (from..to).contains(&token.pos)) {
            token.seqs &= !seqs;
        }
        *cell = cell.filter(|token| token.seqs != 0);
    }
}

/// seq_cp within a stream, and seq_add.
fn edit_sequences(model: &mut Model, stream: usize, rng: &mut Rng) {
    let (from, to) = (1u32 << rng.below(3), 1u32 << rng.below(3));
    let (first, shift) = (rng.below(300) as i32, rng.below(40) as i32 - 20);
    let copy = rng.below(2) == 0;
    for cell in &mut model.streams[stream].cells {
        let Some(token) = cell.as_mut().filter(|token| token.pos >= first && token.seqs & from != 0) else { continue };
        if copy {
            token.seqs |= to;
        } else {
            token.pos += shift;
        }
        *cell = cell.filter(|token| token.pos >= 0);
    }
}

/// Moves the keys of a sequence behind a position, of everything, or, as self-extend does, of each token by its own distance.
fn shift(model: &mut Model, stream: usize, rng: &mut Rng) {
    let (seq, first, distance) = (1 << rng.below(3), rng.below(300) as i32, rng.below(60) as i32 - 30);
    match rng.below(8) {
        0 => model.shift(stream, |token| token.pos / 4 - token.pos),
        1 => model.shift(stream, |_| distance),
        _ => model.shift(stream, |token| if token.seqs & seq != 0 && token.pos >= first { distance } else { 0 }),
    }
}

fn operate(model: &mut Model, next_pos: &mut [Vec<i32>], rng: &mut Rng) {
    let n_streams = model.streams.len();
    let stream = rng.below(n_streams);
    match rng.below(44) {
        0..26 => append(model, stream, &mut next_pos[stream], rng),
        26..31 => {
            let first = rng.below(400) as i32;
            let last = first + [1, rng.below(64) as i32, 1000][rng.below(3)];
            remove(model, stream, [1 << rng.below(3), u32::MAX][rng.below(2)], first, last);
            if rng.below(2) == 0 {
                next_pos[stream].fill(first);
            }
        }
        31..35 => edit_sequences(model, stream, rng),
        35 => {
            model.clear(stream, rng.below(2) == 0);
            next_pos[stream].fill(0);
        }
        36 => {
            let target = rng.below(n_streams);
            model.copy_stream(stream, target);
            next_pos[target] = next_pos[stream].clone();
        }
        37 => model.save_and_restore(stream, rng),
        38..42 => shift(model, stream, rng),
        42 => {
            let host = &model.streams[stream];
            model.planner.drop_dead(stream, &|cell| host.cells[cell].is_some()).unwrap();
        }
        _ => {
            model.append(stream, &[]);
            model.check_locations(stream);
        }
    }
}

#[test]
fn random_operations_keep_every_token_readable_once() {
    let (mut n_records, mut n_recoded) = ([0; 3], 0);
    for seed in 0..2000 {
        let mut rng = Rng::new(seed);
        let config = random_config(&mut rng);
        let mut model = Model::new(config);
        let mut next_pos = vec![vec![0; config.n_seq_max]; config.n_streams];
        for _ in 0..60 {
            operate(&mut model, &mut next_pos, &mut rng);
        }
        n_records.iter_mut().zip(model.n_records).for_each(|(total, n)| *total += n);
        n_recoded += model.n_recoded;
    }
    assert!(n_recoded > 100, "pages must be encoded again now and then: {n_recoded}");
    assert!(n_records.iter().all(|&n| n > 1000), "all kinds of seal must occur often: {n_records:?}");
}

/// Appends `n` tokens of one sequence at the next cells.
fn append_next(model: &mut Model, pos: &mut usize, n: usize) -> usize {
    let rows: Vec<NewRow> = (*pos..*pos + n).map(|pos| NewRow { cell: pos, pos: pos as i32, seqs: 1 }).collect();
    *pos += n;
    model.append(0, &rows)
}

#[test]
fn one_growing_sequence_keeps_window_and_open_page_exact() {
    for seed in 0..300 {
        let mut rng = Rng::new(seed);
        let config = PlannerConfig { n_streams: 1, n_seq_max: 1, ..random_config(&mut rng) };
        let mut model = Model::new(config);
        let mut pos = 0;
        while pos < config.n_cells {
            let n = (1 + [0, rng.below(8), rng.below(3 * config.page)][rng.below(3)]).min(config.n_cells - pos);
            let n_exact = append_next(&mut model, &mut pos, n);
            let open = config.window.max(config.page - 1 + config.seal_lag.min(pos));
            assert!(n_exact <= open + config.sink_tokens, "{n_exact} rows are exact: {config:?}");
            // The last page may be cut short, and is full then.
            let in_pages = if pos == config.n_cells { pos } else { pos / config.page * config.page };
            let sinks = config.sink_tokens.min(pos);
            let exact = config.window.min(pos - sinks).max(pos - in_pages.max(sinks));
            if config.seal_lag == 0 {
                assert_eq!(n_exact, exact + sinks, "full pages are sealed at once: {config:?}");
            }
        }
        assert_eq!(model.n_records[1..], [0; 2], "no page is sealed twice");
    }
}

#[test]
fn lagging_page_is_sealed_when_enough_tokens_follow() {
    let mut model = Model::new(PlannerConfig { window: 0, sink_tokens: 0, seal_lag: 5, ..SMALL });
    let mut pos = 0;
    assert_eq!(append_next(&mut model, &mut pos, 32), 32);
    assert_eq!(append_next(&mut model, &mut pos, 4), 36);
    assert_eq!(append_next(&mut model, &mut pos, 1), 5);
    let mut model = Model::new(PlannerConfig { window: 16, sink_tokens: 0, seal_lag: 5, ..SMALL });
    let mut pos = 0;
    assert_eq!(append_next(&mut model, &mut pos, 36), 36);
    assert_eq!(append_next(&mut model, &mut pos, 1), 16);
}

#[test]
fn hole_in_a_sealed_page_is_patched_under_pressure_only() {
    let mut model = Model::new(PlannerConfig { window: 0, sink_tokens: 0, ..SMALL });
    let mut pos = 0;
    append_next(&mut model, &mut pos, 64);
    remove(&mut model, 0, 1, 10, 12);
    let fill = [10, 11].map(|cell| NewRow { cell, pos: cell as i32, seqs: 1 });
    assert_eq!(model.append(0, &fill), 2);
    assert_eq!(append_next(&mut model, &mut pos, 30), 32);
    assert_eq!(model.n_records, [64, 0, 0]);
    assert_eq!(append_next(&mut model, &mut pos, 1), 31);
    assert_eq!(model.n_records, [64, 2, 0]);
}

#[test]
fn removed_page_is_not_sealed_again_before_it_is_full() {
    let mut model = Model::new(PlannerConfig { window: 0, sink_tokens: 0, ..SMALL });
    append_next(&mut model, &mut 0, 32);
    model.clear(0, false);
    let mut pos = 0;
    for n_exact in 1..32 {
        assert_eq!(append_next(&mut model, &mut pos, 1), n_exact);
    }
    assert_eq!(append_next(&mut model, &mut pos, 1), 0);
    assert_eq!(model.n_records, [64, 0, 0]);
}

/// Appends `n` tokens of sequence `seq` in ubatches of 10, at the cells from `cell` on, which moves; returns those cells.
fn append_sequence(model: &mut Model, cell: &mut usize, seq: usize, n: usize) -> std::ops::Range<usize> {
    let first = *cell;
    for ubatch in (first..first + n).collect::<Vec<_>>().chunks(10) {
        let row = |&cell: &usize| NewRow { cell, pos: 100 + (cell - first) as i32, seqs: 1 << seq };
        model.append(0, &ubatch.iter().map(row).collect::<Vec<_>>());
    }
    *cell += n;
    first..*cell
}

/// How many of the cells are exact.
fn n_exact(model: &Model, cells: std::ops::Range<usize>) -> usize {
    model.planner.locate(0).unwrap()[cells].iter().filter(|location| location.slot().is_some()).count()
}

#[test]
fn each_sequence_keeps_a_window_of_its_own() {
    let mut model = Model::new(PlannerConfig { n_cells: 512, ..SMALL });
    let mut cell = 0;
    let sequences = [0, 1, 2].map(|seq| append_sequence(&mut model, &mut cell, seq, 96));
    for cells in &sequences {
        assert_eq!(n_exact(&model, cells.end - 40..cells.end), 40);
    }
    append_sequence(&mut model, &mut cell, 1, 96);
    assert_eq!(n_exact(&model, sequences[0].end - 40..sequences[0].end), 40, "a neighbour went on");
    assert_eq!(n_exact(&model, sequences[1].clone()), 0, "its own window has moved");
}

#[test]
fn windows_that_do_not_fit_are_cut_alike() {
    // A quarter of the cells is 64 rows: three windows of 40 are too many, two of 32 and the short one are not.
    let mut model = Model::new(PlannerConfig { sink_tokens: 0, ..SMALL });
    let mut cell = 0;
    let short = append_sequence(&mut model, &mut cell, 0, 6);
    let long = [1, 2].map(|seq| append_sequence(&mut model, &mut cell, seq, 80));
    assert_eq!(model.planner.n_slots(), 64);
    assert_eq!(n_exact(&model, short), 6, "as long as the others' windows are");
    let [first, second] = long.map(|cells| n_exact(&model, cells));
    // Cut once, the windows leave room for a page, into which the one that goes on grows.
    assert!(first >= 13 && (first..=40).contains(&second), "{first} and {second}");
}

#[test]
fn a_stream_without_live_tokens_starts_anew() {
    let ubatch = |model: &mut Model, cell: &mut usize, n| {
        append_sequence(model, cell, 0, n);
        model.last_plan().to_vec()
    };
    let starts_anew = |plan: &[i32]| Plan::new(plan).unwrap().starts_anew();
    let mut model = Model::new(PlannerConfig { seal_lag: 7, frees_early: true, ..SMALL });
    let mut cell = 0;
    let first = ubatch(&mut model, &mut cell, 10);
    assert!(starts_anew(&first));
    assert!(!starts_anew(&ubatch(&mut model, &mut cell, 150)));
    // Only a sealed token is left.
    remove(&mut model, 0, 1, 101, 1000);
    assert!(!starts_anew(&ubatch(&mut model, &mut 10, 1)));
    model.clear(0, false);
    assert_eq!(ubatch(&mut model, &mut 0, 10), first, "as by a new planner");
    model.clear(0, false);
    model.append(0, &[]);
    assert!(starts_anew(model.last_plan()) && starts_anew(&ubatch(&mut model, &mut 0, 10)));
}

#[test]
fn refused_arguments_leave_planner_and_buffer_unchanged() {
    let mut planner = Planner::new(SMALL).unwrap();
    let mut out = vec![7; plan_len(2, n_slots(&SMALL), SMALL.n_cells, SMALL.page)];
    let row = |cell| Row { cell, pos: 9, seq: 0 };
    let mut refuse = |stream, rows: &[Row], len: usize, word: &str| {
        let error = planner.plan(stream, rows, &|_| true, &mut out[..len]).unwrap_err();
        assert_eq!(error.status(), Status::InvalidArgument);
        assert!(error.message().contains(word), "{error}");
        assert!(out.iter().all(|&int| int == 7));
    };
    let len = plan_len(2, n_slots(&SMALL), SMALL.n_cells, SMALL.page);
    refuse(1, &[row(0)], len, "stream 1");
    refuse(0, &[row(0), row(256)], len, "cell 256");
    refuse(0, &[row(3), row(3)], len, "twice");
    refuse(0, &[row(3), row(4)], len - 1, "buffer");
    planner.plan(0, &[row(3), row(4)], &|_| false, &mut out).unwrap();
    let plan = Plan::new(&out).unwrap();
    assert_eq!(plan.row_slots(), [0, 1]);
    assert!(plan.slot_cells(View::Before).iter().all(|&cell| cell == -1));
    assert!(planner.reset(1).is_err() && planner.copy_stream(0, 1).is_err() && planner.locate(1).is_err());
}

#[test]
fn impossible_configurations_are_refused() {
    let change = |edit: &dyn Fn(&mut PlannerConfig)| {
        let mut config = SMALL;
        edit(&mut config);
        Planner::new(config).map(|_| ()).unwrap_err().status()
    };
    let edits: [&dyn Fn(&mut PlannerConfig); 9] = [
        &|config| config.n_cells = 0,
        &|config| config.n_cells = usize::MAX,
        &|config| config.page = 0,
        &|config| config.page = 48,
        &|config| config.page = usize::MAX - 31,
        &|config| config.n_streams = 0,
        &|config| config.n_seq_max = 0,
        &|config| config.window = usize::MAX,
        &|config| config.sink_tokens = usize::MAX / 2,
    ];
    assert!(edits.iter().all(|edit| change(edit) == Status::InvalidArgument));
}

#[test]
fn whole_pages_turn_and_only_split_ones_are_encoded_again() {
    let mut model = Model::new(PlannerConfig { window: 0, ..SMALL });
    let mut pos = 0;
    append_next(&mut model, &mut pos, 100);
    remove(&mut model, 0, 1, 10, 18);
    for _ in 0..3 {
        model.shift(0, |token| if token.pos >= 18 { -8 } else { 0 });
    }
    let turned = |model: &Model, cell: usize| model.planner.locate(0).unwrap()[cell].turned;
    // The page on the border has two distances; a sink token and the open page are exact.
    assert_eq!([0, 5, 20, 40, 99].map(|cell| turned(&model, cell)), [0, 0, -24, -24, 0]);
    assert_eq!(model.n_recoded, 0);
    let few = plan::MAX_TURNS as i32 + 1;
    model.shift(0, |token| if token.pos < 64 { 1 + token.pos % few } else { 0 });
    assert_eq!(model.n_recoded, 2);
    assert_eq!([5, 20, 40].map(|cell| turned(&model, cell)), [0; 3]);
    append_next(&mut model, &mut pos, 1);
}

#[test]
fn shifts_that_cannot_be_change_nothing() {
    let mut model = Model::new(PlannerConfig { window: 0, ..SMALL });
    append_next(&mut model, &mut 0, 64);
    model.shift(0, |_| i32::MAX - 63);
    let before = model.planner.snapshot(0).unwrap();
    let planner = &mut model.planner;
    let mut refuse = |stream, moved: &[i32]| planner.shift(stream, moved, &|cell| cell < 64).unwrap_err().status();
    assert_eq!(refuse(1, &[0; 256]), Status::InvalidArgument);
    assert_eq!(refuse(0, &[0; 255]), Status::InvalidArgument);
    assert_eq!(refuse(0, &[64; 256]), Status::InvalidArgument);
    assert_eq!(model.planner.snapshot(0).unwrap(), before);
}
