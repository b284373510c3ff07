use crate::error::Status;
use crate::location::{IN_PAGE, IN_SLOT, NOWHERE};
use crate::plan::plan_len;
use crate::planner::{Planner, PlannerConfig, Row};

const CONFIG: PlannerConfig = PlannerConfig {
    n_cells: 200,
    page: 64,
    window: 40,
    sink_tokens: 2,
    n_streams: 2,
    n_seq_max: 2,
    seal_lag: 3,
    frees_early: false,
    outliers: 0,
};

/// Plans `n` rows behind one another from `cell0` on; cells below `n_dead` are dead.
fn step(planner: &mut Planner, stream: usize, cell0: u32, n: u32, n_dead: usize) -> Vec<i32> {
    let rows: Vec<Row> = (cell0..cell0 + n).map(|cell| Row { cell, pos: cell as i32, seq: cell % 2 }).collect();
    let mut plan = vec![0; plan_len(rows.len(), planner.n_slots(), CONFIG.n_cells, CONFIG.page)];
    planner.plan(stream, &rows, &|cell| (n_dead..cell0 as usize).contains(&cell), &mut plan).unwrap();
    plan
}

fn filled() -> Planner {
    let mut planner = Planner::new(CONFIG).unwrap();
    for (cell0, n) in [(0, 50), (50, 60), (110, 1), (111, 30)] {
        step(&mut planner, 0, cell0, n, 5);
    }
    let moved: Vec<i32> = (0..CONFIG.n_cells as i32).map(|cell| if cell < 40 { -3 } else { 9 }).collect();
    planner.shift(0, &moved, &|cell| (5..141).contains(&cell)).unwrap();
    planner
}

#[test]
fn a_restored_stream_plans_on_as_the_saved_one() {
    let mut planner = filled();
    let bytes = planner.snapshot(0).unwrap();
    assert_eq!(bytes.len(), planner.snapshot_bytes());
    planner.restore(1, &bytes).unwrap();
    assert_eq!(planner.snapshot(1).unwrap(), bytes);
    for (cell0, n, n_dead) in [(141, 1, 5), (142, 40, 60), (182, 18, 60)] {
        let (first, mut second) = (step(&mut planner, 0, cell0, n, n_dead), step(&mut planner, 1, cell0, n, n_dead));
        second[1] = 0;
        assert_eq!(first, second);
    }
}

#[test]
fn damaged_bytes_are_refused_or_make_a_state_that_works() {
    let mut planner = filled();
    let bytes = planner.snapshot(0).unwrap();
    for len in 0..bytes.len() {
        assert_eq!(planner.restore(1, &bytes[..len]).unwrap_err().status(), Status::Format);
    }
    let before = planner.snapshot(1).unwrap();
    for bit in 0..bytes.len() * 8 {
        let mut changed = bytes.clone();
        changed[bit / 8] ^= 1 << (bit % 8);
        match planner.restore(1, &changed) {
            Ok(()) => {
                step(&mut planner, 1, 150, 50, 0);
                planner.restore(1, &before).unwrap();
            }
            Err(error) => {
                assert_eq!(error.status(), Status::Format);
                assert_eq!(planner.snapshot(1).unwrap(), before);
            }
        }
    }
}

#[test]
fn adopted_cells_are_read_from_their_page_and_their_page_mates_are_gone() {
    let mut planner = filled();
    planner.adopt(0, &[64, 66], &[5, -5]).unwrap();
    let turned: Vec<i32> = planner.locate(0).unwrap()[64..68].iter().map(|location| location.turned).collect();
    assert_eq!(turned, [5, 0, -5, 0]);
    assert!(
        planner.adopt(0, &[64, 66], &[5]).is_err()
            && planner.adopt(0, &[64, 65, 66, 67, 68], &[1, 2, 3, 4, 5]).is_err()
    );
    let places: Vec<u32> = planner.locate(0).unwrap().iter().map(|location| location.places).collect();
    assert_eq!(places[64..68], [IN_PAGE, NOWHERE, IN_PAGE, NOWHERE]);
    assert_eq!(places[68..128], [NOWHERE; 60]);
    assert!(places[128..141].iter().all(|places| places & IN_SLOT != 0), "other pages stay");
    assert!(planner.adopt(0, &[3, 3], &[0, 0]).is_err() && planner.adopt(0, &[200], &[0]).is_err());
}
