//! Paths as executors take them: `file://` URIs, made from what people write on the executor's platform.
//! Values only: nothing is looked up, links and `..` are the executor's to resolve.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Longest native path in bytes, the limit of Linux.
pub const PATH_BYTES_MAX: usize = 4096;

/// Longest URI in bytes: a working directory and a path relative to it, every byte of both encoded.
const URI_BYTES_MAX: usize = 2 * 3 * PATH_BYTES_MAX + "file://".len();

/// Why a text is not a path for an executor.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PathError {
    /// No path at all.
    #[error("the path is empty")]
    Empty,
    /// No platform allows NUL in a path.
    #[error("the path holds a NUL character")]
    Nul,
    /// Over the limit.
    #[error("the path is longer than {PATH_BYTES_MAX} bytes")]
    TooLong,
    /// `C:x` depends on a working directory per drive, which executors do not have.
    #[error("the path names a drive but does not start at its root")]
    DriveRelative,
    /// A network path without host and share, or a device.
    #[error("the path names neither a drive nor a network share")]
    Share,
    /// Not an absolute `file://` URI without query and fragment.
    #[error("not a file:// URI")]
    NotFileUri,
    /// The URI's bytes are no UTF-8, so no text can stand for the path.
    #[error("the path is not UTF-8")]
    NotUtf8,
}

/// An absolute `file://` URI.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FileUri(String);

impl FileUri {
    /// Makes the URI of a path as it is written on the executor's machine: absolute, relative to `base` (its working
    /// directory), or behind `~` below `home`. With `windows` both slashes separate, drives and network shares count.
    ///
    /// # Errors
    /// Any [`PathError`] but [`PathError::NotFileUri`] and [`PathError::NotUtf8`].
    pub fn from_native(path: &str, windows: bool, base: &FileUri, home: &FileUri) -> Result<Self, PathError> {
        if path.is_empty() {
            return Err(PathError::Empty);
        }
        if path.contains('\0') {
            return Err(PathError::Nul);
        }
        if path.len() > PATH_BYTES_MAX {
            return Err(PathError::TooLong);
        }
        let slashed = if windows { path.replace('\\', "/") } else { path.to_owned() };
        if slashed == "~" {
            return Ok(home.clone());
        }
        if let Some(rest) = slashed.strip_prefix("~/") {
            return home.join(rest);
        }
        if windows {
            return Self::from_windows(&slashed, base);
        }
        if slashed.starts_with('/') {
            Self::bounded(format!("file://{}", Encoded(&slashed)))
        } else {
            base.join(&slashed)
        }
    }

    /// `path` has forward slashes only.
    fn from_windows(path: &str, base: &FileUri) -> Result<Self, PathError> {
        // The long forms `\\?\C:\x` and `\\?\UNC\host\share` say the same as the short ones.
        if let Some(verbatim) = path.strip_prefix("//?/") {
            return match verbatim.get(..4) {
                Some(unc) if unc.eq_ignore_ascii_case("UNC/") => Self::from_share(&verbatim[4..]),
                _ if drive(verbatim).is_some() => Self::from_windows(verbatim, base),
                _ => Err(PathError::Share),
            };
        }
        if let Some(share) = path.strip_prefix("//") {
            return Self::from_share(share);
        }
        if let Some((letter, rest)) = drive(path) {
            return match rest.starts_with('/') {
                true => Self::bounded(format!("file:///{letter}:{}", Encoded(rest))),
                false => Err(PathError::DriveRelative),
            };
        }
        if path.starts_with('/') {
            return Self::bounded(format!("{}{}", base.root(), Encoded(path)));
        }
        base.join(path)
    }

    /// `host/share` and maybe more.
    fn from_share(path: &str) -> Result<Self, PathError> {
        let (host, rest) = path.split_once('/').ok_or(PathError::Share)?;
        let share = rest.split('/').next().unwrap_or_default();
        if !is_host(host) || share.is_empty() {
            return Err(PathError::Share);
        }
        Self::bounded(format!("file://{host}/{}", Encoded(rest)))
    }

    /// Takes a URI as it stands.
    ///
    /// # Errors
    /// [`PathError::NotFileUri`] for another scheme, a relative path, query, fragment, broken percent-encoding or bytes
    /// that no URI has; [`PathError::Nul`], [`PathError::TooLong`].
    pub fn parse(uri: &str) -> Result<Self, PathError> {
        if uri.len() > URI_BYTES_MAX {
            return Err(PathError::TooLong);
        }
        let rest = uri.strip_prefix("file://").ok_or(PathError::NotFileUri)?;
        let (host, path) = rest.split_at(rest.find('/').ok_or(PathError::NotFileUri)?);
        // A backslash would be a slash to some readers and a character to others.
        let plain = |byte: u8| byte.is_ascii_graphic() && !matches!(byte, b'?' | b'#' | b'\\');
        if !(host.is_empty() || is_host(host)) || !path.bytes().all(plain) {
            return Err(PathError::NotFileUri);
        }
        if decode(path)?.contains(&0) {
            return Err(PathError::Nul);
        }
        // `localhost` says what an empty host says; one form makes equal paths equal texts.
        let host = if host.eq_ignore_ascii_case("localhost") { "" } else { host };
        Ok(Self(format!("file://{host}{path}")))
    }

    /// The URI.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The path as people write it: with backslashes where there is a drive or a network share.
    ///
    /// # Errors
    /// [`PathError::NotUtf8`].
    pub fn to_native(&self) -> Result<String, PathError> {
        let (host, path) = self.parts();
        let native = String::from_utf8(decode(path)?).map_err(|_| PathError::NotUtf8)?;
        if !host.is_empty() {
            return Ok(format!(r"\\{host}{}", native.replace('/', r"\")));
        }
        // Only an unencoded colon makes a drive: a directory `C:` of another platform has it encoded.
        Ok(match drive(&path[1..]) {
            Some((_, rest)) if rest.is_empty() || rest.starts_with('/') => native[1..].replace('/', r"\"),
            _ => native,
        })
    }

    /// The same place without `.` and `..`, which are taken by the text, as executors take them.
    pub fn resolved(&self) -> Self {
        let root = self.root();
        let mut segments = Vec::new();
        for segment in self.0[root.len()..].split('/') {
            match segment {
                "" | "." => {}
                ".." => drop(segments.pop()),
                segment => segments.push(segment),
            }
        }
        Self(format!("{root}/{}", segments.join("/")))
    }

    /// What is in this directory under that name, which has no slash.
    pub fn child(&self, name: &str) -> Self {
        Self(format!("{}/{}", self.0.trim_end_matches('/'), Encoded(name)))
    }

    /// The directory that holds this path, by its text; `None` at a root.
    pub fn parent(&self) -> Option<Self> {
        let trimmed = self.0.trim_end_matches('/');
        let root = self.root();
        let parent = &trimmed[..trimmed.rfind('/')?];
        match parent.len() {
            length if length < root.len() => None,
            length if length == root.len() => Some(Self(format!("{root}/"))),
            _ => Some(Self(parent.to_owned())),
        }
    }

    /// Host, and path from its first slash.
    fn parts(&self) -> (&str, &str) {
        let rest = &self.0["file://".len()..];
        rest.split_at(rest.find('/').expect("both ways to make a URI put a slash behind the host"))
    }

    /// The URI of the drive or share that this path is on, without a slash at its end.
    fn root(&self) -> String {
        let (host, path) = self.parts();
        if !host.is_empty() {
            let share = path[1..].split('/').next().unwrap_or_default();
            return format!("file://{host}/{share}");
        }
        drive(&path[1..]).map_or_else(|| "file://".to_owned(), |(letter, _)| format!("file:///{letter}:"))
    }

    /// `relative` has forward slashes only.
    fn join(&self, relative: &str) -> Result<Self, PathError> {
        let mut uri = self.0.clone();
        for segment in relative.split('/').filter(|segment| !matches!(*segment, "" | ".")) {
            if !uri.ends_with('/') {
                uri.push('/');
            }
            uri.push_str(&Encoded(segment).to_string());
        }
        Self::bounded(uri)
    }

    fn bounded(uri: String) -> Result<Self, PathError> {
        if uri.len() > URI_BYTES_MAX { Err(PathError::TooLong) } else { Ok(Self(uri)) }
    }
}

/// Splits `C:/x` into its letter and what follows the colon.
fn drive(path: &str) -> Option<(char, &str)> {
    let letter = path.chars().next().filter(char::is_ascii_alphabetic)?;
    Some((letter, path[1..].strip_prefix(':')?))
}

fn is_host(host: &str) -> bool {
    // "." and "?" name devices and long forms of Windows, never hosts.
    let host_byte = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
    host != "." && (1..=255).contains(&host.len()) && host.bytes().all(host_byte)
}

/// Writes a path with every byte encoded that is neither unreserved (RFC 3986 §2.3) nor a slash.
struct Encoded<'a>(&'a str);

impl fmt::Display for Encoded<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for byte in self.0.bytes() {
            if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~' | b'/') {
                write!(f, "{}", byte as char)?;
            } else {
                write!(f, "%{byte:02X}")?;
            }
        }
        Ok(())
    }
}

fn decode(path: &str) -> Result<Vec<u8>, PathError> {
    let mut bytes = path.bytes();
    let mut decoded = Vec::with_capacity(path.len());
    while let Some(byte) = bytes.next() {
        if byte != b'%' {
            decoded.push(byte);
            continue;
        }
        let mut digit = || bytes.next().and_then(|byte| (byte as char).to_digit(16)).ok_or(PathError::NotFileUri);
        let value = digit()? << 4 | digit()?;
        decoded.push(value as u8);
    }
    Ok(decoded)
}

impl fmt::Display for FileUri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for FileUri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Serialize for FileUri {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for FileUri {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let uri = String::deserialize(deserializer)?;
        Self::parse(&uri).map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn posix(path: &str) -> Result<String, PathError> {
        native(path, false, "file:///srv/my%20work", "file:///home/ada")
    }

    fn windows(path: &str) -> Result<String, PathError> {
        native(path, true, "file:///D:/work", "file:///C:/Users/Ada")
    }

    fn native(path: &str, windows: bool, base: &str, home: &str) -> Result<String, PathError> {
        let (base, home) = (FileUri::parse(base).unwrap(), FileUri::parse(home).unwrap());
        FileUri::from_native(path, windows, &base, &home).map(|uri| uri.to_string())
    }

    #[test]
    fn posix_paths_are_absolute_relative_or_below_home() {
        for (path, uri) in [
            ("/", "file:///"),
            ("/a b/c", "file:///a%20b/c"),
            ("x/y", "file:///srv/my%20work/x/y"),
            (".", "file:///srv/my%20work"),
            ("./x//y/", "file:///srv/my%20work/x/y"),
            ("../x", "file:///srv/my%20work/../x"),
            ("~", "file:///home/ada"),
            ("~/.ssh", "file:///home/ada/.ssh"),
            ("~bob/x", "file:///srv/my%20work/~bob/x"),
            (r"/a\b", "file:///a%5Cb"),
            ("/C:/x", "file:///C%3A/x"),
            ("/100%?#ü", "file:///100%25%3F%23%C3%BC"),
        ] {
            assert_eq!(posix(path).as_deref(), Ok(uri), "{path}");
        }
        assert_eq!(native("x", false, "file:///", "file:///root").as_deref(), Ok("file:///x"));
    }

    #[test]
    fn dots_are_resolved_by_the_text_and_never_above_the_root() {
        for (uri, resolved) in [
            ("file:///a/./b/../c/", "file:///a/c"),
            ("file:///../../a", "file:///a"),
            ("file:///a/..", "file:///"),
            ("file:///", "file:///"),
            ("file:///C:/a/../../b", "file:///C:/b"),
            ("file://host/share/../x", "file://host/share/x"),
        ] {
            assert_eq!(FileUri::parse(uri).unwrap().resolved().as_str(), resolved, "{uri}");
        }
    }

    #[test]
    fn a_child_is_one_name_below() {
        for (directory, name, uri) in [
            ("file:///", "a b", "file:///a%20b"),
            ("file:///x/", "..a", "file:///x/..a"),
            ("file:///C:/", "é", "file:///C:/%C3%A9"),
        ] {
            assert_eq!(FileUri::parse(directory).unwrap().child(name).as_str(), uri);
        }
    }

    #[test]
    fn windows_paths_have_drives_and_shares() {
        for (path, uri) in [
            (r"C:\a b", "file:///C:/a%20b"),
            ("c:/a", "file:///c:/a"),
            (r"x\y", "file:///D:/work/x/y"),
            (r"\x", "file:///D:/x"),
            (r"~\x", "file:///C:/Users/Ada/x"),
            (r"\\host\share\x", "file://host/share/x"),
            ("//host/share", "file://host/share"),
            (r"\\?\C:\x", "file:///C:/x"),
            (r"\\?\UNC\host\share\x", "file://host/share/x"),
            (r"C:\f:stream", "file:///C:/f%3Astream"),
        ] {
            assert_eq!(windows(path).as_deref(), Ok(uri), "{path}");
        }
        assert_eq!(native(r"\x", true, "file://host/share/dir", "file:///C:/").as_deref(), Ok("file://host/share/x"));
    }

    #[test]
    fn paths_that_mean_nothing_are_refused() {
        assert_eq!(posix(""), Err(PathError::Empty));
        assert_eq!(posix("/a\0b"), Err(PathError::Nul));
        assert_eq!(posix(&"x".repeat(4097)), Err(PathError::TooLong));
        assert!(posix(&"ü".repeat(2048)).is_ok());
        assert_eq!(windows("C:x"), Err(PathError::DriveRelative));
        assert_eq!(windows("C:"), Err(PathError::DriveRelative));
        for path in [r"\\host", r"\\host\", r"\\.\COM1", r"\\ho st\share", r"\\?\GLOBALROOT\x", r"\\?\ü"] {
            assert_eq!(windows(path), Err(PathError::Share), "{path}");
        }
    }

    #[test]
    fn a_working_directory_does_not_grow_without_end() {
        let mut base = FileUri::parse("file:///").unwrap();
        let home = base.clone();
        let refusal = (0..10).find_map(|_| match FileUri::from_native(&"ü".repeat(2048), false, &base, &home) {
            Ok(longer) => {
                base = longer;
                None
            }
            Err(error) => Some(error),
        });
        assert_eq!(refusal, Some(PathError::TooLong));
    }

    #[test]
    fn uris_are_absolute_and_well_formed() {
        for uri in ["file:///", "file:///a%20b", "file://host/share/x", "file:///C:/x", "file:///a'(b)+c=d"] {
            assert_eq!(FileUri::parse(uri).unwrap().as_str(), uri);
        }
        assert_eq!(FileUri::parse("file://localhost/x").unwrap().as_str(), "file:///x");
        for uri in ["", "/x", "http://h/x", "file:x", "file://", "file://host", "file:///a?b", "file:///a#b"] {
            assert_eq!(FileUri::parse(uri), Err(PathError::NotFileUri), "{uri}");
        }
        for uri in
            ["file:///a b", "file:///%2", "file:///%zz", "file:///%+1", r"file:///a\b", "file://u@h/x", "file:///ü"]
        {
            assert_eq!(FileUri::parse(uri), Err(PathError::NotFileUri), "{uri}");
        }
        assert_eq!(FileUri::parse("file:///a%00b"), Err(PathError::Nul));
    }

    #[test]
    fn native_paths_are_those_people_write() {
        let native = |uri| FileUri::parse(uri).unwrap().to_native();
        assert_eq!(native("file:///srv/a%20b").as_deref(), Ok("/srv/a b"));
        assert_eq!(native("file:///C:/a%20b").as_deref(), Ok(r"C:\a b"));
        assert_eq!(native("file:///C%3A/x").as_deref(), Ok("/C:/x"));
        assert_eq!(native("file:///C:x").as_deref(), Ok("/C:x"));
        assert_eq!(native("file://host/share/x").as_deref(), Ok(r"\\host\share\x"));
        assert_eq!(native("file:///%ff"), Err(PathError::NotUtf8));
    }

    #[test]
    fn json_holds_the_uri_and_nothing_else() {
        let uri: FileUri = serde_json::from_str(r#""file:\/\/\/x""#).unwrap();
        assert_eq!(serde_json::to_string(&uri).unwrap(), r#""file:///x""#);
        assert!(serde_json::from_str::<FileUri>(r#""/x""#).is_err());
    }

    proptest! {
        #[test]
        fn absolute_posix_paths_come_back_as_they_were(path in "/\\PC{0,80}") {
            let root = FileUri::parse("file:///").unwrap();
            let uri = FileUri::from_native(&path, false, &root, &root).unwrap();
            prop_assert_eq!(FileUri::parse(uri.as_str()).unwrap(), uri.clone());
            prop_assert_eq!(uri.to_native().unwrap(), path);
        }

        #[test]
        fn every_path_becomes_a_uri_that_parses_or_is_refused(path in "(~|[A-Za-z]:|\\\\\\\\|/)?[\\PC/\\\\]{0,40}", windows: bool) {
            let base = FileUri::parse("file:///C:/base").unwrap();
            if let Ok(uri) = FileUri::from_native(&path, windows, &base, &base) {
                prop_assert_eq!(FileUri::parse(uri.as_str()).unwrap(), uri);
            }
        }
    }
}
