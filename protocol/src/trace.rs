//! Trace context: which distributed trace a request belongs to (W3C Trace Context, level 1).
//!
//! Plain values; who makes spans of them is not known here.

use serde::Serialize;

/// Longest `tracestate` that is handed on, in bytes (W3C Trace Context §3.3.1.5).
const STATE_BYTES_MAX: usize = 512;

/// A caller's place in a trace, as it was told in the headers `traceparent` and `tracestate`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct TraceContext {
    traceparent: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    tracestate: Option<String>,
}

impl TraceContext {
    /// Reads both headers. `None` where the first is not well-formed; a second that is not, or too long, is left out.
    pub fn parse(traceparent: &str, tracestate: Option<&str>) -> Option<Self> {
        let is_hex = |part: &str, digits: usize| {
            part.len() == digits && part.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
        };
        let is_set = |part: &str| part.bytes().any(|byte| byte != b'0');
        let mut parts = traceparent.split('-');
        let (version, trace, parent, flags) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
        let read = is_hex(version, 2)
            && version != "ff"
            && (is_hex(trace, 32) && is_set(trace))
            && (is_hex(parent, 16) && is_set(parent))
            && is_hex(flags, 2)
            // Later versions may say more behind it.
            && (version != "00" || parts.next().is_none());
        let readable = |state: &&str| {
            (1..=STATE_BYTES_MAX).contains(&state.len()) && state.bytes().all(|byte| matches!(byte, b' '..=b'~'))
        };
        read.then(|| Self {
            traceparent: format!("00-{trace}-{parent}-{flags}"),
            tracestate: tracestate.filter(readable).map(str::to_owned),
        })
    }

    /// The value of `traceparent`.
    pub fn traceparent(&self) -> &str {
        &self.traceparent
    }

    /// The value of `tracestate`.
    pub fn tracestate(&self) -> Option<&str> {
        self.tracestate.as_deref()
    }

    /// The trace, as 32 hexadecimal digits.
    pub fn trace_id(&self) -> &str {
        &self.traceparent[3..35]
    }

    /// The caller's place in it, as 16 hexadecimal digits.
    pub fn parent_id(&self) -> &str {
        &self.traceparent[36..52]
    }

    /// Its flags, as 2 hexadecimal digits.
    pub fn flags(&self) -> &str {
        &self.traceparent[53..]
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";

    #[test]
    fn a_place_in_a_trace_is_read_and_told_again() {
        let read = TraceContext::parse(&format!("00-{TRACE}-b7ad6b7169203331-01"), Some("a=1,b=2")).unwrap();
        assert_eq!((read.trace_id(), read.parent_id(), read.flags()), (TRACE, "b7ad6b7169203331", "01"));
        assert_eq!((read.traceparent().len(), read.tracestate()), (55, Some("a=1,b=2")));
        let json = format!(r#"{{"traceparent":"00-{TRACE}-b7ad6b7169203331-01","tracestate":"a=1,b=2"}}"#);
        assert_eq!(serde_json::to_string(&read).unwrap(), json);
        let later = TraceContext::parse(&format!("cc-{TRACE}-b7ad6b7169203331-01-what-comes"), None).unwrap();
        assert_eq!(later.traceparent(), read.traceparent());
    }

    #[test]
    fn what_is_not_well_formed_is_no_trace() {
        for wrong in [
            "",
            "00",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-more",
            "00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01",
            "00-00000000000000000000000000000000-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
            "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319-b7ad6b71692033310-01",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-é",
        ] {
            assert_eq!(TraceContext::parse(wrong, None), None, "{wrong}");
        }
        let good = format!("00-{TRACE}-b7ad6b7169203331-00");
        for state in ["", "a=\u{7f}", &"a".repeat(STATE_BYTES_MAX + 1)] {
            assert_eq!(TraceContext::parse(&good, Some(state)).unwrap().tracestate(), None);
        }
    }
}
