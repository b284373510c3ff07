//! The writer and the reader agree, and malformed plans are refused.
#![forbid(unsafe_code)]

use super::*;
use crate::error::Status;

const SIZES: PlanSizes = PlanSizes { stream: 1, n_tokens: 3, n_slots: 4, n_cells: 100, page: 64 };
const RECORDS: [Record; 2] = [
    Record { cell: 5, source: Source::Slot(3), seal: Seal::Renew },
    Record { cell: 70, source: Source::Row(2), seal: Seal::Fresh },
];

/// Of page 1: cells 65 and 97 by -8, cell 64 by 16.
const TURNS: [i32; 8] = [1, -8, 2, 2, 1, 16, 1, 0];

fn sample() -> Vec<i32> {
    let mut out = vec![-9; plan_len(3, 4, 100, 64)];
    let mut plan = PlanWriter::new(&mut out, &SIZES).unwrap();
    plan.slot_cells(View::Before).copy_from_slice(&[-1, 1, 2, 5]);
    plan.slot_cells(View::After).copy_from_slice(&[0, -1, 2, -1]);
    plan.row_cells().copy_from_slice(&[0, 99, 70]);
    plan.row_slots().copy_from_slice(&[0, -1, -1]);
    plan.set_page_bits(View::Before, &[1 << 31, 1, 0, 0]);
    plan.set_page_bits(View::After, &[0, 0, 2, 0]);
    plan.set_records(&RECORDS);
    plan.set_starts_anew();
    plan.set_turns(&TURNS);
    out
}

#[test]
fn reader_returns_what_was_written() {
    let ints = sample();
    assert_eq!(ints.len(), 16 + 2 * 4 + 2 * 3 + 2 * 4 + 2 * 7 + 4 * 2 * 4);
    let plan = Plan::new(&ints).unwrap();
    plan.check_entries().unwrap();
    assert_eq!((plan.stream(), plan.n_tokens(), plan.n_slots(), plan.n_cells(), plan.page()), (1, 3, 4, 100, 64));
    assert_eq!(plan.slot_cells(View::Before), [-1, 1, 2, 5]);
    assert_eq!(plan.slot_cells(View::After), [0, -1, 2, -1]);
    assert_eq!((plan.row_cells(), plan.row_slots()), (&[0, 99, 70][..], &[0, -1, -1][..]));
    assert_eq!((plan.n_pages(View::Before), plan.n_pages(View::After)), (1, 2));
    assert_eq!(plan.page_bits(View::Before, 0), [i32::MIN, 1]);
    assert_eq!(plan.page_bits(View::After, 1), [2, 0]);
    assert!(plan.records().eq(RECORDS) && plan.starts_anew());
    assert_eq!((plan.n_turns(), plan.turns(0).count()), (2, 0));
    let turns: Vec<_> = plan.turns(1).map(|turn| (turn.page, turn.distance, turn.cells)).collect();
    assert_eq!(turns, [(1, -8, &[2, 2][..]), (1, 16, &[1, 0][..])]);
    assert_eq!([1, 64, 65, 66, 97].map(|cell| plan.turned(cell)), [0, 16, -8, 0, -8]);
}

#[test]
fn short_buffers_are_refused() {
    let ints = sample();
    for len in 0..ints.len() {
        assert_eq!(Plan::new(&ints[..len]).unwrap_err().status(), Status::InvalidArgument);
        assert!(PlanWriter::new(&mut vec![0; len], &SIZES).is_err());
    }
    assert!(Plan::new(&[&ints[..], &[0; 9]].concat()).is_ok(), "a longer buffer is fine");
}

#[test]
fn malformed_headers_are_refused() {
    for index in 0..HEADER_INTS {
        for value in [-1, i32::MIN, i32::MAX, 1 << 20] {
            let mut ints = sample();
            ints[index] = value;
            let any_stream = index == 1 && value >= 0;
            assert_eq!(Plan::new(&ints).is_ok(), any_stream, "header int {index} = {value}");
        }
    }
    let changes =
        [(0, 0), (0, 1), (4, 0), (5, 0), (5, 48), (6, 8), (7, 3), (8, 3), (9, 1), (10, 9), (11, 1), (14, 1), (15, 2)];
    for (index, value) in changes {
        let mut ints = sample();
        ints[index] = value;
        assert!(Plan::new(&ints).is_err(), "header int {index} = {value}");
    }
}

#[test]
fn absurd_sizes_do_not_overflow() {
    assert_eq!(plan_len(usize::MAX, 4, 100, 64), usize::MAX);
    assert_eq!(plan_len(3, usize::MAX, 100, 64), usize::MAX);
    assert!(plan_len(3, 4, usize::MAX, 32) >= usize::MAX / 16);
}

#[test]
fn entries_out_of_range_or_order_are_found() {
    let extent = Extent::new(3, 4, 100, 64);
    let (before, after) = (extent.slot_cells(View::Before).start, extent.slot_cells(View::After).start);
    let (cells, slots) = (extent.row_cells().start, extent.row_slots().start);
    let (records, turns) = (extent.records().start, extent.turns().start);
    let bad = [
        (before, 100),
        (before, -2),
        (after + 3, 100),
        (cells, 100),
        (cells, -1),
        (slots, 4),
        (slots, -2),
        (records, 100),
        (records, -1),
        (records, 71),
        (records, 70),
        (records, 65),
        (records + 1, 7),
        (records + 1, i32::MIN),
        (records + 1, FRESH | RENEW | 3),
        (turns, 2),
        (turns, -1),
        (turns + 4, 0),
    ];
    for (index, value) in bad {
        let mut ints = sample();
        ints[index] = value;
        let plan = Plan::new(&ints).unwrap();
        assert!(plan.check_entries().is_err(), "int {index} = {value}");
        assert_eq!(plan.records().count(), 2);
    }
}
