//! Runs of set bits in the words of a bitmap.

/// Calls `run` with each run of set bits: where, how many.
pub(crate) fn each_run(words: &[u64], mut run: impl FnMut(u64, u64)) {
    let (mut start, mut count) = (0, 0);
    for (index, word) in words.iter().enumerate() {
        let mut rest = *word;
        while rest != 0 {
            let bit = u64::from(rest.trailing_zeros());
            let ones = u64::from((rest >> bit).trailing_ones());
            let page = index as u64 * 64 + bit;
            if start + count != page {
                if count > 0 {
                    run(start, count);
                }
                (start, count) = (page, 0);
            }
            count += ones;
            rest &= u64::MAX.checked_shl((bit + ones) as u32).unwrap_or(0);
        }
    }
    if count > 0 {
        run(start, count);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn runs(words: &[u64]) -> Vec<(u64, u64)> {
        let mut runs = Vec::new();
        each_run(words, |start, count| runs.push((start, count)));
        runs
    }

    #[test]
    fn runs_of_bits_are_found_across_words() {
        assert_eq!(runs(&[]), []);
        assert_eq!(runs(&[0, 0]), []);
        assert_eq!(runs(&[1, 1]), [(0, 1), (64, 1)]);
        assert_eq!(runs(&[u64::MAX, u64::MAX]), [(0, 128)]);
        assert_eq!(runs(&[0b1011 | 1 << 63, 0b101]), [(0, 2), (3, 1), (63, 2), (66, 1)]);
        assert_eq!(runs(&[0, u64::MAX << 60, 1]), [(124, 5)]);
    }
}
