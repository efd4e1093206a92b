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
