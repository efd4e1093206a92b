//! What is below a directory: walked by the executor itself, and by its file calls where it has no POSIX shell.

use std::collections::VecDeque;

use globset::{Glob, GlobBuilder, GlobMatcher, GlobSet, GlobSetBuilder};
use tokio::time::Instant;

use super::{Failure, FileError, native};
use crate::protocol::path::FileUri;
use crate::protocol::rpc::FsReadDirectory;
use crate::relay::client::Client;
use crate::tools::execution::Ended;
use crate::tools::{Site, ToolError};

/// Directories that are read where the executor has no shell, one call each.
const DIRECTORIES_MAX: usize = 2000;

/// Bytes of the patterns of one call.
const PATTERN_BYTES_MAX: usize = 4096;

/// What is left out, where the caller does not say.
const EXCLUDED: &[&str] = &[".git"];

const FIND: &str = include_str!("find.sh");

/// Bytes that the script says at most; `find.sh` has the same.
const FOUND_BYTES_MAX: usize = 8 * 1024 * 1024;

/// What a path has to be like.
pub(super) struct Pattern {
    matcher: GlobMatcher,
    /// What its last name has to be like, for `find`: never narrower than the pattern.
    name: String,
}

/// Names that are left out, with all below them.
pub(super) struct Excluded {
    names: Vec<String>,
    matcher: GlobSet,
}

/// Which entries are wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wanted {
    Files,
    Directories,
    Any,
}

/// What was found.
pub(super) struct Found {
    /// Relative to the directory, with slashes, sorted.
    pub(super) paths: Vec<String>,
    /// Whether there is more than was looked at.
    pub(super) cut: bool,
    /// Directories that may not be read.
    pub(super) unreadable: usize,
}

fn glob(field: &str, pattern: &str) -> Result<Glob, ToolError> {
    if pattern.is_empty() || pattern.len() > PATTERN_BYTES_MAX || pattern.contains('\0') {
        return Err(ToolError::Arguments(format!("{field}: expected a pattern of 1 to {PATTERN_BYTES_MAX} bytes")));
    }
    GlobBuilder::new(pattern)
        .literal_separator(true)
        .backslash_escape(true)
        .build()
        .map_err(|error| ToolError::Arguments(format!("{field}: {}", error.kind())))
}

impl Pattern {
    /// A pattern as callers write it. Without a slash it is for names, at any depth.
    ///
    /// # Errors
    /// [`ToolError::Arguments`].
    pub(super) fn parse(field: &str, pattern: &str) -> Result<Self, ToolError> {
        let pattern = pattern.trim_start_matches("./");
        let whole = if pattern.contains('/') { pattern.to_owned() } else { format!("**/{pattern}") };
        let matcher = glob(field, &whole)?.compile_matcher();
        let last = pattern.rsplit('/').next().unwrap_or_default();
        // What `find` reads otherwise than we do is left to us; a bracket may also have a slash in it.
        let alike = !last.is_empty() && !pattern.contains(['{', '[', '\\']);
        let name = if alike { last.into() } else { "*".into() };
        Ok(Self { matcher, name })
    }

    /// What fits everything.
    pub(super) fn any() -> Self {
        Self { matcher: Glob::new("**").expect("a literal pattern").compile_matcher(), name: "*".into() }
    }

    pub(super) fn fits(&self, path: &str) -> bool {
        self.matcher.is_match(path)
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }
}

impl Excluded {
    /// Names as callers write them.
    ///
    /// # Errors
    /// [`ToolError::Arguments`].
    pub(super) fn parse(names: Option<Vec<String>>) -> Result<Self, ToolError> {
        let names = names.unwrap_or_else(|| EXCLUDED.iter().map(ToString::to_string).collect());
        let mut set = GlobSetBuilder::new();
        for name in &names {
            if name.contains(['/', '{']) {
                return Err(ToolError::Arguments("exclude: expected names, without slashes and braces".into()));
            }
            set.add(glob("exclude", name)?);
        }
        let matcher = set.build().map_err(|error| ToolError::Arguments(format!("exclude: {}", error.kind())))?;
        if names.iter().map(String::len).sum::<usize>() > PATTERN_BYTES_MAX {
            return Err(ToolError::Arguments(format!("exclude: expected at most {PATTERN_BYTES_MAX} bytes")));
        }
        Ok(Self { names, matcher })
    }

    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.names.iter().map(String::as_str)
    }
}

/// What is below the directory, by the executor's `find`; nothing where it has no shell.
///
/// # Errors
/// [`FileError`].
pub(super) async fn find(
    site: Site<'_>,
    directory: &FileUri,
    wanted: Wanted,
    pattern: &Pattern,
    excluded: &Excluded,
    deadline: Instant,
) -> Result<Option<Found>, FileError> {
    let directory = native(directory)?;
    let kind = match wanted {
        Wanted::Files => "file",
        Wanted::Directories => "directory",
        Wanted::Any => "any",
    };
    let mut words = vec![directory.as_str(), kind, pattern.name()];
    words.extend(excluded.names());
    let Some(ended) = site.script(FIND, &words, deadline).await? else { return Ok(None) };
    let names = ended.stdout.split_inclusive(|byte| *byte == 0).filter_map(|name| name.strip_suffix(b"\0"));
    Ok(Some(found(&ended, names, FOUND_BYTES_MAX, pattern)?))
}

/// What a walking script has said.
///
/// # Errors
/// [`Failure`] where it could not begin.
pub(super) fn found<'a>(
    ended: &'a Ended,
    names: impl Iterator<Item = &'a [u8]>,
    bytes_max: usize,
    pattern: &Pattern,
) -> Result<Found, Failure> {
    if ended.exit_code == Some(3) {
        return Err(Failure::new("no_permission", "the directory may not be entered"));
    }
    // Names that are no UTF-8 cannot be told to callers, and nobody could ask for them.
    let paths = names.filter_map(|name| std::str::from_utf8(name).ok()).filter_map(|name| name.strip_prefix("./"));
    let mut paths: Vec<String> = paths.filter(|path| pattern.fits(path)).map(str::to_owned).collect();
    paths.sort_unstable();
    let errors = String::from_utf8_lossy(&ended.stderr);
    let unreadable = errors.lines().filter(|line| line.ends_with("Permission denied")).count();
    Ok(Found { paths, cut: ended.stdout.len() >= bytes_max || ended.lost_bytes > 0, unreadable })
}

/// What is below the directory, by reading one directory after the other.
///
/// # Errors
/// [`FileError`].
pub(super) async fn read(
    client: &Client,
    directory: &FileUri,
    wanted: Wanted,
    pattern: &Pattern,
    excluded: &Excluded,
) -> Result<Found, FileError> {
    let mut found = Found { paths: Vec::new(), cut: false, unreadable: 0 };
    let mut left = VecDeque::from([(directory.clone(), String::new())]);
    let mut reads = 0;
    while let Some((directory, prefix)) = left.pop_front() {
        if reads == DIRECTORIES_MAX {
            found.cut = true;
            break;
        }
        reads += 1;
        let entries = match client.call(&FsReadDirectory { path: directory.clone() }).await.map_err(FileError::from) {
            Ok(listed) => listed.entries,
            Err(FileError::Failed(_)) if reads > 1 => {
                found.unreadable += 1;
                continue;
            }
            Err(error) => return Err(error),
        };
        for entry in entries {
            if excluded.matcher.is_match(&entry.file_name) {
                continue;
            }
            let path = format!("{prefix}{}", entry.file_name);
            if entry.is_directory {
                left.push_back((directory.child(&entry.file_name), format!("{path}/")));
            }
            let fits = match wanted {
                Wanted::Files => !entry.is_directory,
                Wanted::Directories => entry.is_directory,
                Wanted::Any => true,
            };
            if fits && pattern.fits(&path) {
                found.paths.push(path);
            }
        }
    }
    found.paths.sort_unstable();
    Ok(found)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_pattern_fits_names_at_any_depth_and_paths_from_the_directory() {
        for (pattern, fits, fits_not) in [
            ("*.rs", &["a.rs", "b/c/a.rs", ".rs"][..], &["a.rsx"][..]),
            ("src/*.rs", &["src/a.rs"], &["src/b/a.rs", "x/src/a.rs"]),
            ("./src/**/*.rs", &["src/a.rs", "src/b/c/a.rs"], &["a.rs"]),
            ("**/test_[!a]?.{py,pyi}", &["test_bc.py", "x/test_bc.pyi"], &["test_ac.py"]),
            ("docs/**", &["docs/a", "docs/a/b"], &["docs"]),
            (r"a\*b", &["a*b", "c/a*b"], &["axb"]),
        ] {
            let glob = Pattern::parse("pattern", pattern).unwrap();
            for path in fits {
                assert!(glob.fits(path), "{pattern} {path}");
            }
            for path in fits_not {
                assert!(!glob.fits(path), "{pattern} {path}");
            }
        }
        assert!(Pattern::any().fits("a/b/c"));
    }

    #[test]
    fn the_executor_is_told_a_name_where_it_reads_it_as_we_do() {
        for (pattern, name) in [
            ("*.rs", "*.rs"),
            ("a/**/b?", "b?"),
            ("a/**", "**"),
            ("*.{a,b}", "*"),
            (r"a\*", "*"),
            ("x/", "*"),
            ("{a/b,c}", "*"),
        ] {
            assert_eq!(Pattern::parse("pattern", pattern).unwrap().name(), name, "{pattern}");
        }
    }
}
