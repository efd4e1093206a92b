//! AWS Signature Version 4: a request signed with a secret that is not in it (codex-exec-server.md §2.2).
//!
//! Owned by [`super::executor`]. It rebuilds what was signed from the request as it arrived, for any region and service,
//! and knows no secret itself.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use hmac::{Hmac, Mac};
use hyper::header::AUTHORIZATION;
use hyper::{HeaderMap, Method, Uri};
use sha2::{Digest, Sha256};
use subtle::{Choice, ConstantTimeEq};

/// How far the clock of who signed may be from ours.
const SKEW_MAX: Duration = Duration::from_secs(300);

/// Longest `authorization` header looked at, in bytes.
const HEADER_BYTES_MAX: usize = 4096;

const ALGORITHM: &str = "AWS4-HMAC-SHA256";

/// A request as it arrived.
#[derive(Debug, Clone, Copy)]
pub struct SignedRequest<'a> {
    /// Its method.
    pub method: &'a Method,
    /// Path and query, with the escapes of the wire.
    pub uri: &'a Uri,
    /// All headers.
    pub headers: &'a HeaderMap,
    /// The whole body.
    pub body: &'a [u8],
}

/// Why a request shows no usable signature.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SigV4Error {
    /// There is no such `authorization` header, or it has another form.
    #[error("no AWS4-HMAC-SHA256 signature")]
    Missing,
    /// `host` or `x-amz-date` is not among the signed headers, or a signed header is not in the request.
    #[error("the signature does not cover the request")]
    Uncovered,
    /// It was made more than five minutes ago or ahead, or its date is no date.
    #[error("the signature's time is too far from now")]
    Skewed,
}

/// What an `authorization` header says. It is checked with [`Signature::is_of`] only.
pub struct Signature<'a> {
    request: SignedRequest<'a>,
    key_id: &'a str,
    date: &'a str,
    region: &'a str,
    service: &'a str,
    time: &'a str,
    signed_headers: &'a str,
    signature: [u8; 32],
}

impl<'a> Signature<'a> {
    /// Reads the signature of a request.
    ///
    /// # Errors
    /// [`SigV4Error`].
    pub fn read(request: SignedRequest<'a>, now: SystemTime) -> Result<Self, SigV4Error> {
        let mut values = request.headers.get_all(AUTHORIZATION).iter();
        let (Some(value), None) = (values.next(), values.next()) else { return Err(SigV4Error::Missing) };
        let text = value.to_str().ok().filter(|text| text.len() <= HEADER_BYTES_MAX).ok_or(SigV4Error::Missing)?;
        let members =
            text.strip_prefix(ALGORITHM).and_then(|rest| rest.strip_prefix(' ')).ok_or(SigV4Error::Missing)?;
        let member = |name: &str| {
            let found = members.split(',').filter_map(|part| part.trim().split_once('=')).find(|(key, _)| *key == name);
            found.map(|(_, value)| value).ok_or(SigV4Error::Missing)
        };
        let scope: Vec<&str> = member("Credential")?.split('/').collect();
        let [key_id, date, region, service, "aws4_request"] = scope[..] else { return Err(SigV4Error::Missing) };
        let signed_headers = member("SignedHeaders")?;
        let signature = parse_hex(member("Signature")?).ok_or(SigV4Error::Missing)?;
        let covers = |name: &str| signed_headers.split(';').any(|signed| signed == name);
        if !covers("host") || !covers("x-amz-date") {
            return Err(SigV4Error::Uncovered);
        }
        let time =
            request.headers.get("x-amz-date").and_then(|time| time.to_str().ok()).ok_or(SigV4Error::Uncovered)?;
        let signed_at = parse_time(time).filter(|_| time.starts_with(date) && date.len() == 8);
        let away = signed_at.map(|at| now.duration_since(at).unwrap_or_else(|ahead| ahead.duration()));
        if away.is_none_or(|away| away > SKEW_MAX) {
            return Err(SigV4Error::Skewed);
        }
        let all_there = signed_headers.split(';').all(|name| request.headers.contains_key(name));
        if !all_there {
            return Err(SigV4Error::Uncovered);
        }
        Ok(Self { request, key_id, date, region, service, time, signed_headers, signature })
    }

    /// Whose secret it says it was made with.
    pub fn key_id(&self) -> &'a str {
        self.key_id
    }

    /// Whether it was made with this secret, in constant time.
    pub fn is_of(&self, secret: &str) -> Choice {
        let scope = format!("{}/{}/{}/aws4_request", self.date, self.region, self.service);
        let digest = hex(&Sha256::digest(self.canonical_request()));
        let text = format!("{ALGORITHM}\n{}\n{scope}\n{digest}", self.time);
        let start = mac(format!("AWS4{secret}").as_bytes(), self.date);
        let key = [self.region, self.service, "aws4_request"].iter().fold(start, |key, part| mac(&key, part));
        mac(&key, &text).ct_eq(&self.signature)
    }

    fn canonical_request(&self) -> String {
        let SignedRequest { method, uri, headers, body } = self.request;
        // Escapes of the wire are escaped once more, as all services but one have it.
        let path = escape(uri.path().as_bytes(), b"/");
        let mut pairs: Vec<(String, String)> = uri.query().unwrap_or_default().split('&').filter_map(pair).collect();
        pairs.sort();
        let query: Vec<String> = pairs.iter().map(|(name, value)| format!("{name}={value}")).collect();
        let lines = self.signed_headers.split(';').map(|name| {
            let values = headers.get_all(name).iter().map(|value| String::from_utf8_lossy(value.as_bytes()));
            let values: Vec<String> =
                values.map(|value| value.split_ascii_whitespace().collect::<Vec<_>>().join(" ")).collect();
            format!("{name}:{}\n", values.join(","))
        });
        let (lines, digest) = (lines.collect::<String>(), hex(&Sha256::digest(body)));
        format!("{method}\n{path}\n{}\n{lines}\n{}\n{digest}", query.join("&"), self.signed_headers)
    }
}

fn mac(key: &[u8], text: &str) -> [u8; 32] {
    let mut mac = Hmac::<Sha256>::new_from_slice(key).expect("HMAC takes keys of any length");
    mac.update(text.as_bytes());
    mac.finalize().into_bytes().into()
}

fn pair(text: &str) -> Option<(String, String)> {
    if text.is_empty() {
        return None;
    }
    let (name, value) = text.split_once('=').unwrap_or((text, ""));
    Some((escape(&unescape(name), b""), escape(&unescape(value), b"")))
}

/// Decodes `%XX`, and leaves what is none as it is.
fn unescape(text: &str) -> Vec<u8> {
    let mut rest = text.as_bytes();
    let mut plain = Vec::with_capacity(rest.len());
    while let Some((first, behind)) = rest.split_first() {
        let digits = behind.get(..2).filter(|_| *first == b'%').and_then(|digits| std::str::from_utf8(digits).ok());
        let escaped = digits.filter(|digits| digits.bytes().all(|digit| digit.is_ascii_hexdigit()));
        let escaped = escaped.and_then(|digits| u8::from_str_radix(digits, 16).ok());
        plain.push(escaped.unwrap_or(*first));
        rest = &behind[if escaped.is_some() { 2 } else { 0 }..];
    }
    plain
}

fn escape(text: &[u8], also_plain: &[u8]) -> String {
    let mut escaped = String::with_capacity(text.len());
    for &byte in text {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) || also_plain.contains(&byte) {
            escaped.push(char::from(byte));
        } else {
            escaped.push_str(&format!("%{byte:02X}"));
        }
    }
    escaped
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn parse_hex(text: &str) -> Option<[u8; 32]> {
    if text.len() != 64 || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    let mut bytes = [0; 32];
    for (nth, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&text[2 * nth..2 * nth + 2], 16).ok()?;
    }
    Some(bytes)
}

/// `20150830T123600Z`
fn parse_time(text: &str) -> Option<SystemTime> {
    let bytes = text.as_bytes();
    if bytes.len() != 16 || bytes[8] != b'T' || bytes[15] != b'Z' {
        return None;
    }
    let number = |from: usize, to: usize| {
        let digits = text.get(from..to).filter(|digits| digits.bytes().all(|byte| byte.is_ascii_digit()))?;
        digits.parse::<u64>().ok()
    };
    let (year, month, day) = (number(0, 4)?, number(4, 6)?, number(6, 8)?);
    let (hour, minute, second) = (number(9, 11)?, number(11, 13)?, number(13, 15)?);
    if year < 1970 || !(1..=12).contains(&month) || !(1..=31).contains(&day) || hour > 23 || minute > 59 || second > 60
    {
        return None;
    }
    // Days since 1970 by counting years from March, so that the leap day is the last of its year (Hinnant,
    // days_from_civil).
    let (year, month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let days = 365 * year + year / 4 - year / 100 + year / 400 + (153 * month + 2) / 5 + day - 1 - 719_468;
    Some(UNIX_EPOCH + Duration::from_secs(((days * 24 + hour) * 60 + minute) * 60 + second))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const SECRET: &str = "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY";

    /// A request of AWS's documentation or test suite.
    struct Example {
        method: Method,
        uri: Uri,
        headers: HeaderMap,
        body: &'static [u8],
    }

    impl Example {
        fn new(method: Method, uri: &str, headers: &[(&'static str, &str)], service: &str, signature: &str) -> Self {
            let signed: Vec<&str> = headers.iter().map(|(name, _)| *name).collect();
            let mut headers: HeaderMap =
                headers.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect();
            let authorization = format!(
                "AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/20150830/us-east-1/{service}/aws4_request, \
                 SignedHeaders={}, Signature={signature}",
                signed.join(";")
            );
            headers.insert(AUTHORIZATION, authorization.parse().unwrap());
            Self { method, uri: uri.parse().unwrap(), headers, body: b"" }
        }

        fn vanilla() -> Self {
            let headers = [("host", "example.amazonaws.com"), ("x-amz-date", "20150830T123600Z")];
            let signature = "5fa00fa31553b73ebf1942676e86291e8372ff2a2260956d9b8aae1d763fbf31";
            Self::new(Method::GET, "/", &headers, "service", signature)
        }

        fn read(&self, seconds: i64) -> Result<bool, SigV4Error> {
            let at = parse_time("20150830T123600Z").unwrap();
            let apart = Duration::from_secs(seconds.unsigned_abs());
            let now = if seconds < 0 { at - apart } else { at + apart };
            let request =
                SignedRequest { method: &self.method, uri: &self.uri, headers: &self.headers, body: self.body };
            let signature = Signature::read(request, now)?;
            assert_eq!(signature.key_id(), "AKIDEXAMPLE");
            Ok(signature.is_of(SECRET).into())
        }
    }

    #[test]
    fn published_examples_are_verified() {
        let plain = [("host", "example.amazonaws.com"), ("x-amz-date", "20150830T123600Z")];
        let form = [
            ("content-type", "application/x-www-form-urlencoded; charset=utf-8"),
            ("host", "iam.amazonaws.com"),
            ("x-amz-date", "20150830T123600Z"),
        ];
        for (method, uri, headers, service, signature) in [
            // The signing example of AWS's general reference.
            (
                Method::GET,
                "/?Action=ListUsers&Version=2010-05-08",
                &form[..],
                "iam",
                "5d672d79c15b13162d9279b0855cfba6789a8edb4c82c400e06b5924a6f2b5d7",
            ),
            // get-vanilla, post-vanilla and get-vanilla-query-order-key-case of the test suite.
            (
                Method::GET,
                "/",
                &plain[..],
                "service",
                "5fa00fa31553b73ebf1942676e86291e8372ff2a2260956d9b8aae1d763fbf31",
            ),
            (
                Method::POST,
                "/",
                &plain[..],
                "service",
                "5da7c1a2acd57cee7505fc6676e4e544621c30862966e37dddb68e92efbe5d6b",
            ),
            (
                Method::GET,
                "/?Param2=value2&Param1=value1",
                &plain[..],
                "service",
                "b97d918cfa904a5beff61c982a1b6f458b799221646efd99d3219ec94cdf2500",
            ),
        ] {
            assert_eq!(Example::new(method, uri, headers, service, signature).read(0), Ok(true), "{uri}");
        }
    }

    #[test]
    fn what_was_altered_is_not_of_the_secret() {
        type Change = fn(&mut Example);
        let changes: [Change; 5] = [
            |example| example.method = Method::POST,
            |example| example.uri = "/a".parse().unwrap(),
            |example| example.uri = "/?a".parse().unwrap(),
            |example| example.body = b"x",
            |example| drop(example.headers.insert("host", "example.com".parse().unwrap())),
        ];
        for change in changes {
            let mut example = Example::vanilla();
            change(&mut example);
            assert_eq!(example.read(0), Ok(false));
        }
    }

    #[test]
    fn five_minutes_apart_are_believed_and_more_are_not() {
        for (seconds, answer) in
            [(300, Ok(true)), (-300, Ok(true)), (301, Err(SigV4Error::Skewed)), (-301, Err(SigV4Error::Skewed))]
        {
            assert_eq!(Example::vanilla().read(seconds), answer, "{seconds} s");
        }
    }

    #[test]
    fn a_signature_that_covers_too_little_or_has_another_form_is_refused() {
        type Change = fn(&str) -> String;
        let cases: [(Change, SigV4Error); 8] = [
            (|text| text.replace("host;", ""), SigV4Error::Uncovered),
            (|text| text.replace("host;x-amz-date", "host"), SigV4Error::Uncovered),
            (|text| text.replace("host;", "host;x-other;"), SigV4Error::Uncovered),
            (|text| text.replace("/20150830/", "/20150829/"), SigV4Error::Skewed),
            (|text| text.replace("AWS4-HMAC-SHA256 ", "Bearer "), SigV4Error::Missing),
            (|text| text.replace("/aws4_request", ""), SigV4Error::Missing),
            (|text| text.replace("Signature=", "Signatur="), SigV4Error::Missing),
            (|text| text[..text.len() - 1].to_owned(), SigV4Error::Missing),
        ];
        for (change, error) in cases {
            let mut example = Example::vanilla();
            let text = change(example.headers[AUTHORIZATION].to_str().unwrap());
            example.headers.insert(AUTHORIZATION, text.parse().unwrap());
            assert_eq!(example.read(0), Err(error), "{text}");
        }
        let mut twice = Example::vanilla();
        let value = twice.headers[AUTHORIZATION].clone();
        twice.headers.append(AUTHORIZATION, value);
        assert_eq!(twice.read(0), Err(SigV4Error::Missing));
    }

    #[test]
    fn times_are_read_and_what_is_none_is_not() {
        let secs = |text| parse_time(text).map(|time| time.duration_since(UNIX_EPOCH).unwrap().as_secs());
        assert_eq!(secs("19700101T000000Z"), Some(0));
        assert_eq!(secs("20150830T123600Z"), Some(1_440_938_160));
        assert_eq!(secs("20240229T235959Z"), Some(1_709_251_199));
        for text in ["", "20150830T123600", "20151330T123600Z", "2015é830T12360Z", "+0150830T123600Z"] {
            assert_eq!(secs(text), None, "{text}");
        }
    }
}
