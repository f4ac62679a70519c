//! Bitmaps, planes and segments against models that are too simple to be wrong.

use afterimage_protocol::bitmap::{
    Bitmap, MAX_SEGMENT_PAGES, PageState, Planes, Segment, SegmentError, words_for,
};
use afterimage_protocol::layout::{PageNumber, PageRange};
use proptest::collection::vec;
use proptest::prelude::*;

/// What a bitmap is asked to do.
#[derive(Clone, Debug)]
enum Change {
    Set(PageRange),
    Clear(PageRange),
    SetOne(PageNumber),
    ClearOne(PageNumber),
}

/// What planes are asked to do.
#[derive(Clone, Debug)]
enum Step {
    Claim(PageRange),
    GiveBack(PageRange),
    Complete(PageRange),
    Forget,
}

proptest! {
    #[test]
    fn a_bitmap_does_what_a_list_of_bools_does((pages, changes) in sized(changes)) {
        let bitmap = Bitmap::new(pages);
        let mut model = vec![false; pages as usize];
        for change in changes {
            apply(&bitmap, &mut model, &change)?;
            prop_assert_eq!(bitmap.count(), model.iter().filter(|bit| **bit).count() as u64);
        }
        prop_assert_eq!(bitmap.runs().collect::<Vec<_>>(), runs_of(&model, true, whole(pages)));
        for (page, bit) in model.iter().enumerate() {
            prop_assert_eq!(bitmap.test(PageNumber(page as u64)), *bit);
        }
        for index in words_for(pages).saturating_sub(1)..words_for(pages) {
            let used = pages - index as u64 * 64;
            prop_assert!(used == 64 || bitmap.word(index) >> used == 0, "bits beyond the end");
        }
    }

    #[test]
    fn a_range_of_a_bitmap_is_counted_and_searched(
        (pages, (bits, range, from, limit)) in sized(|pages| (
            patterned(pages), range_in(pages), 0..=pages + 1, prop_oneof![0..5_u64, 0..=pages + 1],
        )),
    ) {
        let bitmap = bitmap_of(&bits);
        let counted = range.iter().filter(|page| bits[page.0 as usize]).count() as u64;
        prop_assert_eq!(bitmap.count_in(range), counted);
        let rest = PageRange::new(PageNumber(from), pages.saturating_sub(from));
        let next = runs_of(&bits, true, rest).first().map(|run| {
            PageRange::new(run.start, run.count.min(limit))
        });
        prop_assert_eq!(
            bitmap.next_set(PageNumber(from), limit),
            next.filter(|run| !run.is_empty())
        );
        let next = runs_of(&bits, false, rest).first().map(|run| {
            PageRange::new(run.start, run.count.min(limit))
        });
        prop_assert_eq!(
            bitmap.next_clear(PageNumber(from), limit),
            next.filter(|run| !run.is_empty())
        );
        prop_assert_eq!(
            bitmap.first_clear_in(range),
            runs_of(&bits, false, range).first().copied()
        );
    }

    #[test]
    fn planes_do_what_a_list_of_states_does((pages, steps) in sized(steps)) {
        let planes = Planes::new(pages);
        let mut model = vec![PageState::Free; pages as usize];
        for step in steps {
            take(&planes, &mut model, &step)?;
            let complete = model.iter().filter(|state| **state == PageState::Complete).count();
            prop_assert_eq!(planes.complete_count(), complete as u64);
            for (page, state) in model.iter().enumerate() {
                prop_assert_eq!(planes.state(PageNumber(page as u64)), *state, "page {}", page);
            }
        }
    }

    #[test]
    fn what_is_missing_is_told_in_whole_runs(
        (pages, (complete, range)) in sized(|pages| (
            vec(any::<bool>(), pages as usize), range_in(pages),
        )),
    ) {
        let planes = Planes::new(pages);
        for run in runs_of(&complete, true, whole(pages)) {
            planes.complete(run, |_| ());
        }
        let mut missing = Vec::new();
        planes.incomplete_in(range, |run| missing.push(run));
        prop_assert_eq!(missing, runs_of(&complete, false, range));
        prop_assert_eq!(
            planes.completed().runs().collect::<Vec<_>>(),
            runs_of(&complete, true, whole(pages))
        );
    }

    #[test]
    fn a_segment_says_what_the_bitmap_says_and_is_never_larger_than_raw(
        (pages, (bits, first, count)) in sized(|pages| (
            patterned(pages), 0..=(pages - 1) / 64, 0..=pages,
        )),
    ) {
        let bitmap = bitmap_of(&bits);
        let start = first * 64;
        let range = PageRange::new(PageNumber(start), count.min(pages - start));
        let segment = Segment::encode(&bitmap, range);
        let raw = words_for(range.count) * 8;
        match &segment {
            Segment::Runs(bytes) => prop_assert!(bytes.len() < raw),
            Segment::Raw(bytes) => {
                prop_assert_eq!(bytes.len(), raw);
                // Raw is only chosen where it is not the larger: rebuild the runs naively.
                prop_assert!(runs_length(&bits, range) >= raw);
            }
        }
        let mut found = Vec::new();
        segment.decode(range, |run| found.push(run)).unwrap();
        prop_assert_eq!(found, runs_of(&bits, true, range));
    }

    #[test]
    fn arbitrary_bytes_never_name_a_page_outside_of_the_range(
        bytes in vec(prop_oneof![any::<u8>(), 0..4_u8, Just(0x80), Just(0xff)], 0..80),
        first in 0..4_u64,
        count in 0..300_u64,
        raw in any::<bool>(),
    ) {
        let range = PageRange::new(PageNumber(first * 64), count);
        let segment = if raw { Segment::Raw(bytes) } else { Segment::Runs(bytes) };
        let (mut end, mut inside) = (range.start.0, true);
        let result = segment.decode(range, |run| {
            inside &= run.count > 0 && run.start.0 >= end && run.end() <= range.end();
            end = run.start.0 + run.count;
        });
        prop_assert!(inside, "{:?} of {:?}", segment, range);
        if let (Segment::Raw(bytes), Ok(())) = (&segment, result) {
            prop_assert_eq!(bytes.len(), words_for(count) * 8);
        }
    }
}

#[test]
fn few_runs_travel_as_runs_and_noise_as_words() {
    let range = whole(4096);
    let bitmap = Bitmap::new(4096);
    assert_eq!(Segment::encode(&bitmap, range), Segment::Runs(vec![]));
    bitmap.set(range, |_| ());
    assert_eq!(Segment::encode(&bitmap, range), Segment::Runs(vec![0, 0x80, 0x20]));
    for page in (0..4096).step_by(2) {
        bitmap.clear_one(PageNumber(page));
    }
    assert_eq!(Segment::encode(&bitmap, range), Segment::Raw(vec![0xaa; 512]));
}

#[test]
fn a_segment_refuses_what_is_wrong_with_its_bytes() {
    let refused = |segment: Segment, count| segment.decode(whole(count), |_| ()).unwrap_err();
    let runs = |bytes: &[u8]| Segment::Runs(bytes.to_vec());
    let raw = |bytes: &[u8]| Segment::Raw(bytes.to_vec());
    let too_long = MAX_SEGMENT_PAGES + 1;
    assert_eq!(refused(runs(&[]), too_long), SegmentError::TooLong { pages: too_long });
    assert_eq!(refused(runs(&[1, 0x80]), 9), SegmentError::BadNumber { offset: 1 });
    assert_eq!(refused(runs(&[0x80; 9]), 9), SegmentError::BadNumber { offset: 0 });
    // Five bytes hold every number that can be, six are refused.
    assert_eq!(runs(&[0x80, 0x80, 0x80, 0x80, 0]).decode(whole(9), |_| ()), Ok(()));
    let six = refused(runs(&[0x80, 0x80, 0x80, 0x80, 0x80, 0]), 9);
    assert_eq!(six, SegmentError::BadNumber { offset: 0 });
    assert_eq!(refused(runs(&[5, 5]), 9), SegmentError::Beyond { reached: 10, pages: 9 });
    assert_eq!(refused(raw(&[0; 7]), 9), SegmentError::BadRaw { bytes: 7, pages: 9 });
    assert_eq!(refused(raw(&[0; 16]), 64), SegmentError::BadRaw { bytes: 16, pages: 64 });
    let beyond = [0, 2, 0, 0, 0, 0, 0, 0];
    assert_eq!(refused(raw(&beyond), 9), SegmentError::BadRaw { bytes: 8, pages: 9 });
    assert_eq!(raw(&beyond).decode(whole(10), |_| ()), Ok(()));
    assert_eq!(runs(&[4, 5]).decode(whole(9), |_| ()), Ok(()));
}

#[test]
fn a_bitmap_of_the_callers_words_keeps_what_they_hold() {
    let words: Vec<_> = [0b1010_u64, 1].map(std::sync::atomic::AtomicU64::new).into();
    let bitmap = Bitmap::over(words, 65);
    let runs: Vec<_> = bitmap.runs().map(|run| run.start.0).collect();
    assert_eq!(runs, [1, 3, 64]);
}

#[test]
#[should_panic(expected = "too few words")]
fn a_bitmap_of_too_few_words_is_refused() {
    let _ = Bitmap::over(vec![std::sync::atomic::AtomicU64::new(0)], 65);
}

#[test]
fn pages_that_a_bitmap_does_not_have_are_never_set() {
    let bitmap = Bitmap::new(100);
    // The last is in a word that the bitmap has, the others are not.
    for (start, count) in [(90, 11), (100, 1), (127, 1), (128, 1), (u64::MAX, 1), (1, u64::MAX)] {
        let range = PageRange::new(PageNumber(start), count);
        let refused = |work: &dyn Fn() -> u64| {
            let work = std::panic::AssertUnwindSafe(work);
            std::panic::catch_unwind(work).is_err()
        };
        assert!(refused(&|| bitmap.set(range, |_| ())), "set {range}");
        assert!(refused(&|| bitmap.clear(range, |_| ())), "clear {range}");
        assert!(refused(&|| bitmap.count_in(range)), "count {range}");
    }
    assert_eq!(bitmap.count(), 0);
    assert_eq!(bitmap.set(PageRange::new(PageNumber(100), 0), |_| ()), 0);
}

#[test]
fn a_handler_that_takes_planes_over_frees_what_was_claimed() {
    let planes = Planes::new(130);
    planes.claim(PageRange::new(PageNumber(60), 70), |_| ());
    planes.complete(PageRange::new(PageNumber(63), 2), |_| ());
    planes.forget_claims();
    assert_eq!(planes.state(PageNumber(62)), PageState::Free);
    assert_eq!(planes.state(PageNumber(63)), PageState::Complete);
    assert_eq!(planes.claim(whole(130), |_| ()), 128);
}

fn apply(bitmap: &Bitmap, model: &mut [bool], change: &Change) -> Result<(), TestCaseError> {
    match *change {
        Change::Set(range) => {
            let expected = runs_of(model, false, range);
            let mut changed = Vec::new();
            let count = bitmap.set(range, |run| changed.push(run));
            prop_assert_eq!(count, expected.iter().map(|run| run.count).sum::<u64>());
            prop_assert_eq!(changed, expected);
            range.iter().for_each(|page| model[page.0 as usize] = true);
        }
        Change::Clear(range) => {
            let expected = runs_of(model, true, range);
            let mut changed = Vec::new();
            let count = bitmap.clear(range, |run| changed.push(run));
            prop_assert_eq!(count, expected.iter().map(|run| run.count).sum::<u64>());
            prop_assert_eq!(changed, expected);
            range.iter().for_each(|page| model[page.0 as usize] = false);
        }
        Change::SetOne(page) => {
            let was = std::mem::replace(&mut model[page.0 as usize], true);
            prop_assert_eq!(bitmap.set_one(page), !was);
        }
        Change::ClearOne(page) => {
            let was = std::mem::replace(&mut model[page.0 as usize], false);
            prop_assert_eq!(bitmap.clear_one(page), was);
        }
    }
    Ok(())
}

fn take(planes: &Planes, model: &mut [PageState], step: &Step) -> Result<(), TestCaseError> {
    let pages = |model: &[PageState], range: PageRange, wanted: &dyn Fn(PageState) -> bool| {
        let is: Vec<_> = model.iter().map(|state| wanted(*state)).collect();
        runs_of(&is, true, range)
    };
    match *step {
        Step::Claim(range) => {
            let free = pages(model, range, &|state| state == PageState::Free);
            let mut won = Vec::new();
            let count = planes.claim(range, |run| won.push(run));
            prop_assert_eq!(count, free.iter().map(|run| run.count).sum::<u64>());
            prop_assert_eq!(won, free);
            let claimed = range.iter().map(|page| page.0 as usize);
            for page in claimed.filter(|page| model[*page] == PageState::Free).collect::<Vec<_>>() {
                model[page] = PageState::Claimed;
            }
        }
        Step::GiveBack(range) => {
            planes.give_back(range);
            give_back(&mut model[range.start.0 as usize..][..range.count as usize]);
        }
        Step::Complete(range) => {
            let missing = pages(model, range, &|state| state != PageState::Complete);
            let mut newly = Vec::new();
            let count = planes.complete(range, |run| newly.push(run));
            prop_assert_eq!(count, missing.iter().map(|run| run.count).sum::<u64>());
            prop_assert_eq!(newly, missing);
            range.iter().for_each(|page| model[page.0 as usize] = PageState::Complete);
        }
        Step::Forget => {
            planes.forget_claims();
            give_back(model);
        }
    }
    Ok(())
}

fn give_back(model: &mut [PageState]) {
    model.iter_mut().filter(|state| **state == PageState::Claimed).for_each(|state| {
        *state = PageState::Free;
    });
}

/// The runs of pages in `range` whose bit is `wanted`, page by page.
fn runs_of(bits: &[bool], wanted: bool, range: PageRange) -> Vec<PageRange> {
    let mut runs: Vec<PageRange> = Vec::new();
    for page in range.iter().filter(|page| bits[page.0 as usize] == wanted) {
        match runs.last_mut() {
            Some(run) if run.end() == Some(page) => run.count += 1,
            _ => runs.push(PageRange::one(page)),
        }
    }
    runs
}

/// How many bytes the form by runs takes.
fn runs_length(bits: &[bool], range: PageRange) -> usize {
    let mut reached = range.start.0;
    let digits = |number: u64| (64 - (number | 1).leading_zeros()).div_ceil(7) as usize;
    let runs = runs_of(bits, true, range).into_iter().map(|run| {
        let clear = run.start.0 - reached;
        reached = run.start.0 + run.count;
        digits(clear) + digits(run.count)
    });
    runs.sum()
}

fn bitmap_of(bits: &[bool]) -> Bitmap {
    let bitmap = Bitmap::new(bits.len() as u64);
    for (page, _) in bits.iter().enumerate().filter(|(_, bit)| **bit) {
        bitmap.set_one(PageNumber(page as u64));
    }
    bitmap
}

fn whole(pages: u64) -> PageRange {
    PageRange::new(PageNumber(0), pages)
}

/// A number of pages, rarely a multiple of 64, and what depends on it.
fn sized<S: Strategy>(then: impl Fn(u64) -> S) -> impl Strategy<Value = (u64, S::Value)>
where
    S::Value: Clone,
{
    prop_oneof![1..400_u64, (1..5_u64).prop_map(|words| words * 64)]
        .prop_flat_map(move |pages| (Just(pages), then(pages)))
}

fn range_in(pages: u64) -> impl Strategy<Value = PageRange> {
    (0..=pages).prop_flat_map(move |start| {
        (0..=pages - start).prop_map(move |count| PageRange::new(PageNumber(start), count))
    })
}

fn changes(pages: u64) -> impl Strategy<Value = Vec<Change>> {
    let change = prop_oneof![
        range_in(pages).prop_map(Change::Set),
        range_in(pages).prop_map(Change::Clear),
        (0..pages).prop_map(|page| Change::SetOne(PageNumber(page))),
        (0..pages).prop_map(|page| Change::ClearOne(PageNumber(page))),
    ];
    vec(change, 0..40)
}

fn steps(pages: u64) -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        8 => range_in(pages).prop_map(Step::Claim),
        4 => range_in(pages).prop_map(Step::GiveBack),
        4 => range_in(pages).prop_map(Step::Complete),
        1 => Just(Step::Forget),
    ];
    vec(step, 0..25)
}

/// Bits as they come: noise, or few long runs.
fn patterned(pages: u64) -> impl Strategy<Value = Vec<bool>> {
    let pages = pages as usize;
    let long = vec((any::<bool>(), 1..200_usize), 1..8).prop_map(move |runs| {
        let bits = runs.into_iter().flat_map(|(bit, count)| std::iter::repeat_n(bit, count));
        bits.chain(std::iter::repeat(false)).take(pages).collect::<Vec<_>>()
    });
    prop_oneof![vec(any::<bool>(), pages), long]
}
