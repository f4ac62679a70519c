//! What this machine has of what the engine needs, with reasons and remedies.
//!
//! Asks and changes nothing; works without any privilege, and then says what is lacking.
//! How each thing is asked for is in `checks`.

mod checks;

use crate::sys::uffd::FaultScope;
use std::fmt;

/// Looks at the kernel, the rights of this process, and its limits.
///
/// Opens and closes a few descriptors; takes some milliseconds; may be called from any
/// thread. What it finds holds for this process: a child with other rights finds other
/// things.
///
/// ```
/// use afterimage::{FaultScope, probe};
///
/// let probe = probe();
/// println!("{probe}");
/// for finding in probe.missing(FaultScope::KernelAndUser) {
///     eprintln!("a guest on KVM cannot be served: {}", finding.remedy);
/// }
/// ```
#[must_use]
pub fn probe() -> Probe {
    Probe { findings: checks::all() }
}

/// What [`probe`] found. Shown as a table by `Display`.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Probe {
    /// In the order of the table, what matters most first.
    pub findings: Vec<Finding>,
}

impl Probe {
    /// The finding with this name.
    #[must_use]
    pub fn find(&self, name: &str) -> Option<&Finding> {
        self.findings.iter().find(|finding| finding.name == name)
    }

    /// What is lacking without which a destination that must see these faults cannot work.
    /// A source needs less: the kernel's release only.
    pub fn missing(&self, scope: FaultScope) -> impl Iterator<Item = &Finding> {
        self.findings
            .iter()
            .filter(move |it| it.state == FindingState::Lacking && it.need.is_of(scope))
    }
}

/// One thing that was looked for.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Finding {
    /// What it is; stays the same from release to release.
    pub name: String,
    /// Whether it is there.
    pub state: FindingState,
    /// Who cannot do without.
    pub need: Need,
    /// What was found: a number, a release, what the system said.
    pub found: String,
    /// What it is for, or what follows if it is lacking.
    pub meaning: String,
    /// How to mend it; empty if it is there, or cannot be mended.
    pub remedy: String,
}

/// Whether something is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum FindingState {
    /// It is, and enough of it.
    Ok,
    /// It is not, or this process may not use it, or it is too little.
    Lacking,
}

impl fmt::Display for FindingState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Ok => "ok",
            Self::Lacking => "lacking",
        })
    }
}

/// Who cannot do without something.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Need {
    /// Every destination.
    Always,
    /// Destinations whose faults KVM or system calls take.
    KernelFaults,
    /// Nobody; something is slower or not possible without.
    Useful,
}

impl Need {
    const fn is_of(self, scope: FaultScope) -> bool {
        match self {
            Self::Always => true,
            Self::KernelFaults => matches!(scope, FaultScope::KernelAndUser),
            Self::Useful => false,
        }
    }
}

impl fmt::Display for Need {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Always => "always",
            Self::KernelFaults => "kvm",
            Self::Useful => "useful",
        })
    }
}

impl fmt::Display for Probe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = |of: fn(&Finding) -> &str, heading: &str| {
            let widest = self.findings.iter().map(|it| of(it).chars().count()).max();
            widest.unwrap_or(0).max(heading.len())
        };
        let names = width(|it| &it.name, "what");
        let found = width(|it| &it.found, "found").min(32);
        writeln!(
            f,
            "{:<8} {:<7} {:<names$} {:<found$} meaning",
            "state", "needed", "what", "found"
        )?;
        for it in &self.findings {
            writeln!(
                f,
                "{:<8} {:<7} {:<names$} {:<found$} {}",
                it.state, it.need, it.name, it.found, it.meaning
            )?;
            if !it.remedy.is_empty() {
                writeln!(f, "{:<8} {:<7} {:<names$} remedy: {}", "", "", "", it.remedy)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_finding_says_what_it_means_and_what_lacks_says_how_to_mend_it() {
        let probe = probe();
        for finding in &probe.findings {
            assert!(!finding.found.is_empty() && !finding.meaning.is_empty(), "{finding:?}");
            let is_ok = finding.state == FindingState::Ok;
            assert_eq!(finding.remedy.is_empty(), is_ok, "{finding:?}");
            let twins = probe.findings.iter().filter(|it| it.name == finding.name).count();
            assert_eq!(twins, 1, "{}", finding.name);
        }
        let table = probe.to_string();
        assert!(probe.findings.iter().all(|it| table.contains(&it.name)), "{table}");
    }

    #[test]
    fn the_probe_agrees_with_the_engine() {
        use crate::sys::uffd::{Features, create};
        let shared = Features::MISSING_SHMEM.with(Features::MINOR_SHMEM);
        for scope in [FaultScope::KernelAndUser, FaultScope::UserOnly] {
            let is_possible = create(scope, shared).is_ok();
            assert_eq!(probe().missing(scope).count() == 0, is_possible, "{scope:?}\n{}", probe());
        }
    }

    #[test]
    fn a_need_is_a_matter_of_the_faults() {
        assert!(Need::Always.is_of(FaultScope::UserOnly));
        assert!(!Need::KernelFaults.is_of(FaultScope::UserOnly));
        assert!(Need::KernelFaults.is_of(FaultScope::KernelAndUser));
        assert!(!Need::Useful.is_of(FaultScope::KernelAndUser));
    }
}
