//! What a patch makes of the files that it names, all in memory: each section sees what those before it made.

use std::borrow::Cow;
use std::collections::HashMap;
use std::hash::Hash;

use super::apply::{Misfit, apply};
use super::search::Work;
use super::{Action, Hunk, Patch, Target};

/// One file as it shall become. A file that stays as it is has none.
#[derive(Debug, PartialEq, Eq)]
pub(in crate::tools) struct Change<P> {
    pub(in crate::tools) path: P,
    /// All of it; none where it goes.
    pub(in crate::tools) content: Option<Vec<u8>>,
    /// Whose mode a new file takes, where it was moved or copied.
    pub(in crate::tools) like: Option<P>,
    /// Whether it can be run, where that changes.
    pub(in crate::tools) executable: Option<bool>,
}

/// Why one section cannot be carried out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(in crate::tools) enum Failure {
    /// There is no such file.
    #[error("no such file")]
    Missing,
    /// A file is where the patch makes one.
    #[error("a file is there already")]
    Exists,
    /// Its hunks do not fit.
    #[error("{0}")]
    Misfit(Misfit),
    /// The file holds more than the hunks that delete it say.
    #[error("the file has more lines than the patch deletes")]
    Left,
    /// The files are more than one patch may hold in memory.
    #[error("the files of one patch may have {0} bytes together")]
    TooLarge(usize),
}

impl Failure {
    /// The kind, for programs.
    pub(in crate::tools) fn code(&self) -> &'static str {
        match self {
            Self::Missing => "not_found",
            Self::Exists => "exists",
            Self::Misfit(Misfit::TooMuch) | Self::TooLarge(_) => "too_large",
            Self::Misfit(_) | Self::Left => "no_match",
        }
    }
}

/// A file while the sections are gone through.
struct State<'b, P> {
    now: Option<Cow<'b, [u8]>>,
    like: Option<P>,
    executable: Option<bool>,
}

/// Goes through the sections of a patch. `before` is the content of every file that is there, of those that the patch
/// names; `path` makes one value of all ways to write a path. The files may have `bytes_max` together at any time.
///
/// # Errors
/// What is wrong with each section, in their order; where a section is fine it is none.
pub(in crate::tools) fn plan<P: Clone + Eq + Hash + Ord>(
    patch: &Patch<'_>,
    path: impl Fn(&str) -> P,
    before: &HashMap<P, Vec<u8>>,
    bytes_max: usize,
) -> Result<Vec<Change<P>>, Vec<Option<Failure>>> {
    let there = |content| State { now: Some(Cow::Borrowed(content)), like: None, executable: None };
    let mut files = Files {
        before,
        now: before.iter().map(|(path, content)| (path.clone(), there(&**content))).collect(),
        bytes: before.values().map(Vec::len).sum(),
        bytes_max,
        work: Work::new(),
    };
    let sections = patch.files.iter();
    let failures: Vec<_> = sections.map(|file| files.section(path(&file.path), &file.action, &path).err()).collect();
    if failures.iter().any(Option::is_some) {
        return Err(failures);
    }
    let mut changes: Vec<_> = files.now.into_iter().filter_map(|(path, state)| state.change(path, before)).collect();
    changes.sort_by(|one, other| one.path.cmp(&other.path));
    Ok(changes)
}

struct Files<'b, P> {
    before: &'b HashMap<P, Vec<u8>>,
    now: HashMap<P, State<'b, P>>,
    /// Of all contents together.
    bytes: usize,
    bytes_max: usize,
    work: Work,
}

impl<'b, P: Clone + Eq + Hash> Files<'b, P> {
    fn section(&mut self, path: P, action: &Action<'_>, key: impl Fn(&str) -> P) -> Result<(), Failure> {
        match action {
            Action::Add { replace: false, .. } if self.is_there(&path) => Err(Failure::Exists),
            Action::Add { content, executable, .. } => {
                self.put(path, Some(Cow::Owned(content.clone())), None, executable.then_some(true))
            }
            Action::Delete { hunks: None } if !self.is_there(&path) => Err(Failure::Missing),
            Action::Delete { hunks } => {
                if let Some(hunks) = hunks
                    && !self.applied(&path, hunks)?.is_empty()
                {
                    return Err(Failure::Left);
                }
                self.put(path, None, None, None)
            }
            Action::Update { hunks, to, executable } => {
                let content = Some(Cow::Owned(self.applied(&path, hunks)?));
                let State { like, executable: former, .. } = &self.now[&path];
                let (like, executable) = (like.clone(), executable.or(*former));
                let Some(Target { path: target, copy, replace }) = to else {
                    return self.put(path, content, like, executable);
                };
                let target = key(target);
                if target == path {
                    return self.put(path, content, like, executable);
                }
                if !replace && self.is_there(&target) {
                    return Err(Failure::Exists);
                }
                let like = like.or_else(|| self.before.contains_key(&path).then(|| path.clone()));
                if !copy {
                    self.put(path, None, None, None)?;
                }
                self.put(target, content, like, executable)
            }
        }
    }

    fn is_there(&self, path: &P) -> bool {
        self.now.get(path).is_some_and(|state| state.now.is_some())
    }

    /// The content of that file after these hunks.
    fn applied(&mut self, path: &P, hunks: &[Hunk<'_>]) -> Result<Vec<u8>, Failure> {
        let content = self.now.get(path).and_then(|state| state.now.as_ref()).ok_or(Failure::Missing)?;
        apply(content, hunks, &mut self.work).map_err(Failure::Misfit)
    }

    fn put(
        &mut self,
        path: P,
        now: Option<Cow<'b, [u8]>>,
        like: Option<P>,
        executable: Option<bool>,
    ) -> Result<(), Failure> {
        let len = |now: Option<&Cow<'_, [u8]>>| now.map_or(0, |now| now.len());
        let former = len(self.now.get(&path).and_then(|state| state.now.as_ref()));
        let bytes = self.bytes - former + len(now.as_ref());
        if bytes > self.bytes_max {
            return Err(Failure::TooLarge(self.bytes_max));
        }
        self.bytes = bytes;
        self.now.insert(path, State { now, like, executable });
        Ok(())
    }
}

impl<P: Eq + Hash> State<'_, P> {
    fn change(self, path: P, before: &HashMap<P, Vec<u8>>) -> Option<Change<P>> {
        let Self { now, like, executable } = self;
        let there = before.get(&path);
        if now.as_deref() == there.map(|there| &**there) && executable.is_none() {
            return None;
        }
        Some(Change { path, content: now.map(Cow::into_owned), like, executable })
    }
}
