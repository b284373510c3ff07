//! Removing, copying, keeping and shifting sequences, always followed by appends that are compared with exact attention.

use super::*;

#[test]
fn cells_of_removed_tokens_are_used_again() {
    let mut model = Model::new(SPEC, &params());
    model.append(0, 200);
    model.append(1, 100);
    model.cache.remove(Some(0), 50, 150).unwrap();
    model.tokens.retain(|token| token.seq != 0 || !(50..150).contains(&token.pos));
    assert_eq!(model.cache.n_tokens(), 200);
    for n in [1, 40, 1, 60] {
        model.append(1, n);
        model.append(0, 1);
    }
    model.cache.remove(None, 100, -1).unwrap();
    model.tokens.retain(|token| token.pos < 100);
    assert_eq!(model.cache.sequence_range(1).unwrap(), Some((0, 99)));
    model.append(1, 90);
    model.append(0, 2);
}

#[test]
fn copied_sequences_share_cells_and_part_ways() {
    let mut model = Model::new(SPEC, &params());
    model.append(0, 120);
    model.append(2, 3);
    model.cache.copy(0, 2, 0, 100).unwrap();
    model.tokens.retain(|token| token.seq == 0);
    let copies: Vec<Token> = model.tokens.iter().filter(|token| token.pos < 100).cloned().collect();
    model.tokens.extend(copies.into_iter().map(|token| Token { seq: 2, ..token }));
    assert_eq!(model.cache.n_tokens(), 120);
    for _ in 0..3 {
        model.append(0, 30);
        model.append(2, 31);
    }
    assert!(model.cache.shift(2, 0, 50, 1000).is_err(), "shared with sequence 0");
    model.cache.keep(2).unwrap();
    model.tokens.retain(|token| token.seq == 2);
    assert_eq!(model.cache.n_tokens(), 193);
    assert_eq!(model.cache.sequence_range(0).unwrap(), None);
    model.append(2, 40);
    model.append(0, 40);
}

#[test]
fn a_batch_may_mix_sequences() {
    let mut model = Model::new(SPEC, &params());
    let mut next = [0; 4];
    for n in [40, 3, 90, 7, 80] {
        let seqs: Vec<u32> = (0..n).map(|_| model.rng.below(4) as u32).collect();
        let mut position = |&seq: &u32| {
            next[seq as usize] += 1;
            next[seq as usize] - 1
        };
        let positions: Vec<i32> = seqs.iter().map(&mut position).collect();
        model.step(&seqs, &positions);
    }
}

#[test]
fn shifting_turns_the_keys() {
    // With 200 tokens the window holds rows that are in their page already.
    for (interleaved, n) in [(false, 250), (true, 250), (false, 200)] {
        let rope = Rope { n_rot: 48, freq_base: 1e4, freq_scale: 0.5, interleaved };
        let mut model = Model::new(SPEC, &CacheParams { rope: Some(rope), n_threads: 2, ..params() });
        model.append(0, n);
        model.cache.remove(Some(0), 4, 104).unwrap();
        model.cache.shift(0, 104, -1, -100).unwrap();
        model.tokens.retain(|token| !(4..104).contains(&token.pos));
        model.tokens.iter_mut().filter(|token| token.pos >= 104).for_each(|token| token.pos -= 100);
        assert_eq!(model.cache.sequence_range(0).unwrap(), Some((0, n as i32 - 101)));
        for n in [1, 60, 1, 90] {
            model.append(0, n);
        }
    }
}

#[test]
fn without_rope_only_positions_move() {
    let mut model = Model::new(SPEC, &params());
    model.append(0, 100);
    model.cache.shift(0, 40, -1, 7).unwrap();
    model.tokens.iter_mut().filter(|token| token.pos >= 40).for_each(|token| token.pos += 7);
    model.n_swa = vec![30, 65];
    model.append(0, 50);
}

#[test]
fn shifts_that_make_no_sense_change_nothing() {
    let mut model = Model::new(SPEC, &params());
    model.append(0, 50);
    let before = model.cache.cells.clone();
    for (start, end, delta) in [(0, -1, -1), (10, 20, 5), (10, 20, -3), (49, -1, i32::MAX), (0, 10, i32::MIN)] {
        let error = model.cache.shift(0, start, end, delta).unwrap_err();
        assert_eq!(error.status(), Status::InvalidArgument, "{start}..{end} by {delta}");
    }
    assert!(model.cache.shift(9, 0, 1, 1).is_err() && model.cache.copy(0, 9, 0, 1).is_err());
    assert!(model.cache.keep(9).is_err() && model.cache.remove(Some(9), 0, 1).is_err());
    assert_eq!(model.cache.cells, before);
    model.append(0, 5);
}

#[test]
fn clearing_forgets_all() {
    let mut model = Model::new(SPEC, &params());
    model.append(0, 300);
    model.cache.clear().unwrap();
    model.tokens.clear();
    assert!(model.cache.layers.iter().all(|layer| layer.k.bytes().iter().all(|&byte| byte == 0)));
    model.append(0, 100);
}
