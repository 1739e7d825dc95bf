//! [`Mask::visible`] against the rules it states, pair by pair.

use crate::common::{cases, mask};
use flashlla::Mask;
use proptest::prelude::*;

/// Whether a query sees a key, from the description of each part of a mask alone.
pub fn sees(mask: &Mask, query: usize, key: usize) -> bool {
    let (position, key) = (query as i64 + mask.offset(), key as i64);
    let sequence = |place: i64| {
        mask.sequences()
            .map_or(Some(0), |cu| cu.windows(2).position(|w| (w[0] as i64..w[1] as i64).contains(&place)))
    };
    let inside = mask.sequences().is_none() || sequence(position) == sequence(key);
    let causal = !mask.is_causal() || key <= position;
    let window = mask.window_len().is_none_or(|window| key > position - window as i64);
    let own = mask.is_leave_one_out() && key == position;
    inside && causal && window && !own
}

proptest! {
    #![proptest_config(cases(400))]

    #[test]
    fn a_query_sees_what_every_part_of_the_mask_allows((queries, keys, mask) in mask()) {
        for i in 0..queries {
            let visible = mask.visible(i, keys);
            let seen: Vec<usize> = visible.iter().collect();
            let expected: Vec<usize> = (0..keys).filter(|&j| sees(&mask, i, j)).collect();
            prop_assert_eq!(&seen, &expected, "query {} of {:?}", i, mask);
            prop_assert_eq!(visible.count(), expected.len());
            prop_assert!((0..keys).all(|j| visible.contains(j) == sees(&mask, i, j)));
        }
    }

    #[test]
    fn contexts_that_grow_begin_with_a_token_and_grow_by_one((queries, keys, mask) in mask()) {
        if mask.grows(queries, keys) {
            let mut before = None;
            for i in 0..queries {
                let visible = mask.visible(i, keys);
                let range = visible.start..visible.end;
                let first = range.is_empty() || range.len() == 1;
                let one_more = before == Some((visible.start, visible.end.wrapping_sub(1)));
                prop_assert!(first || one_more, "query {i} of {mask:?} sees {range:?} after {before:?}");
                before = Some((visible.start, visible.end));
            }
        }
    }
}

#[test]
fn contexts_grow_under_causal_masks_from_the_first_token_on() {
    for (mask, queries, keys, grows) in [
        (Mask::causal(), 8, 8, true),
        (Mask::causal(), 8, 9, true),
        (Mask::causal(), 9, 8, false), // the last two see the same keys
        (Mask::causal().q_offset(-3), 8, 5, true),
        (Mask::causal().q_offset(1), 7, 8, false),
        (Mask::causal().cu_seqlens([0, 3, 8]), 8, 8, true),
        (Mask::causal().leave_one_out(), 8, 8, true),
        (Mask::causal().window(8), 8, 8, false),
        (Mask::full(), 8, 8, false),
    ] {
        assert_eq!(mask.grows(queries, keys), grows, "{mask:?}, {queries} queries, {keys} keys");
    }
}

#[test]
fn extreme_offsets_and_windows_do_not_overflow() {
    let seen = |mask: Mask| mask.visible(0, 5).iter().collect::<Vec<usize>>();
    let nothing: [usize; 0] = [];
    assert_eq!(seen(Mask::causal().q_offset(i64::MIN)), nothing);
    assert_eq!(seen(Mask::full().q_offset(i64::MIN).window(3)), [0, 1, 2, 3, 4]);
    assert_eq!(seen(Mask::causal().q_offset(i64::MAX)), [0, 1, 2, 3, 4]);
    assert_eq!(seen(Mask::causal().q_offset(i64::MAX - 1).window(usize::MAX)), [0, 1, 2, 3, 4]);
    assert_eq!(seen(Mask::causal().q_offset(4).window(usize::MAX)), [0, 1, 2, 3, 4]);
    assert_eq!(seen(Mask::causal().q_offset(i64::MIN).window(usize::MAX).leave_one_out()), nothing);
    assert!(!Mask::causal().grows(usize::MAX, 5) && Mask::causal().q_offset(i64::MIN).grows(usize::MAX, 5));
}
