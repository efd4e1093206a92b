//! Files of an environment over plain HTTP, of any size: `GET`, `HEAD` and `PUT …/envs/{name}/files?path=`.
//!
//! Bytes pass as they come, a few blocks ahead of the slower end. A file that cannot be read to its end breaks the
//! answer off; a caller that leaves in the middle of a `PUT` leaves nothing behind.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt;
use hyper::body::{Body as HttpBody, Incoming};
use hyper::header::{
    ACCEPT_RANGES, CACHE_CONTROL, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, ETAG, HeaderName, HeaderValue, IF_MATCH,
    IF_NONE_MATCH, IF_RANGE, RANGE, X_CONTENT_TYPE_OPTIONS,
};
use hyper::{HeaderMap, Method, Request, Response, StatusCode};
use serde_json::json;
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::calls::Admitted;
use super::error::ApiError;
use super::transfer::next;
use super::{Api, audited, json, query_parameter, read_only, timing};
use crate::audit::{Act, Entry, Outcome};
use crate::auth::Principal;
use crate::edge::body::{self, Body, BodyError, full};
use crate::edge::pipe::pipe;
use crate::store::Binding;
use crate::tools::{Call, Download, Upload, Uploaded};

/// Blocks between an executor and its caller, besides those that are being read.
const BLOCKS: usize = 1;

/// What the blocks of one file take together.
const BLOCKS_BYTES: u64 = 5 * 1024 * 1024;

/// A caller at a file.
struct Visit {
    admitted: Admitted,
    call: Call,
    binding: Binding,
    path: String,
}

impl Visit {
    /// A caller who may do `action`, at the file of the query.
    async fn begin<B>(
        api: &Api,
        action: &'static str,
        may: impl FnOnce(&Principal) -> bool,
        environment: &str,
        request: &Request<B>,
    ) -> Result<Self, ApiError> {
        let mut admitted = Admitted::known(api, action, request.headers(), timing(request)).await?;
        if !may(&admitted.principal) {
            return Err(read_only());
        }
        let path = query_parameter(request.uri().query().unwrap_or_default(), "path")
            .ok_or_else(|| ApiError::new(400, "bad_arguments", "path: is missing from the query, or no UTF-8"))?;
        admitted.take_place(api)?;
        api.memory.admit()?;
        admitted.held.grow(BLOCKS_BYTES)?;
        let call = admitted.call(api);
        let binding = admitted.workspace.environment(environment).await?;
        Ok(Self { admitted, call, binding, path })
    }

    /// What is about to be done with the file, as it is recorded.
    fn act(&self) -> Act {
        let act = self.admitted.act.clone().at(self.binding.name().as_str()).on(self.binding.executor());
        act.about(json!({ "path": self.path }))
    }
}

/// `GET` and `HEAD …/envs/{name}/files?path=`
pub async fn get(api: &Arc<Api>, environment: &str, request: Request<Incoming>) -> Result<Response<Body>, ApiError> {
    let visit = Visit::begin(api, "file.get", |_| true, environment, &request).await?;
    let entry = api.audit.begin(visit.act()).await?;
    send(visit, &request, entry).await.map_err(|(error, entry)| {
        entry.end(audited::failed(&error));
        error
    })
}

/// The file, or the part of it that is wanted. The record of it ends with its last byte.
async fn send(visit: Visit, request: &Request<Incoming>, entry: Entry) -> Result<Response<Body>, (ApiError, Entry)> {
    let Visit { admitted: Admitted { right, place, .. }, call, binding, path } = visit;
    let download = match Download::of(call, binding, &path).await {
        Ok(download) => download,
        Err(error) => return Err((error.into(), entry)),
    };
    let (tag, size) = (format!("\"{}\"", download.tag()), download.size());
    let wanted = request.headers();
    let (status, range) = if names(wanted, IF_NONE_MATCH, &tag) {
        (StatusCode::NOT_MODIFIED, 0..0)
    } else {
        let whole = 0..size.unwrap_or(0);
        let unchanged = wanted.get(IF_RANGE).is_none_or(|known| known.as_bytes() == tag.as_bytes());
        match wanted.get(RANGE).filter(|_| unchanged).and_then(|range| Some((range.to_str().ok()?, size?))) {
            None => (StatusCode::OK, whole),
            Some((range, size)) => match parse_range(range, size) {
                Wanted::Part(part) => (StatusCode::PARTIAL_CONTENT, part),
                Wanted::Everything => (StatusCode::OK, whole),
                Wanted::Nothing => {
                    let all = HeaderValue::from_str(&format!("bytes */{size}")).expect("digits");
                    let refused = ApiError::new(416, "range_not_satisfiable", format!("the file has {size} bytes"));
                    return Err((refused.with_header(CONTENT_RANGE, all), entry));
                }
            },
        }
    };
    let length = size.map(|_| range.end - range.start);
    let body = if request.method() == Method::HEAD || status == StatusCode::NOT_MODIFIED {
        entry.end(Outcome::new("ok").bytes(0, 0));
        full("")
    } else {
        let (writer, body) = pipe(BLOCKS, length);
        let (blocks, mut poured) = mpsc::channel::<Bytes>(BLOCKS);
        let range = range.clone();
        body.pumped_by(async move {
            let sent = AtomicU64::new(0);
            let written = async {
                while let Some(block) = poured.recv().await {
                    sent.fetch_add(block.len() as u64, Relaxed);
                    writer.write(block).await.ok()?;
                }
                Some(())
            };
            let moved = async {
                let (poured, written) = tokio::join!(download.pour(range, blocks), written);
                poured.inspect_err(|error| tracing::debug!(%error, "a file was broken off")).ok().and(written)
            };
            let whole = tokio::select! {
                whole = moved => whole,
                _ = right.ended() => None,
            };
            let outcome = if whole.is_some() { "ok" } else { "broken_off" };
            entry.end(Outcome::new(outcome).bytes(0, sent.load(Relaxed)));
            if whole.is_some() {
                let _ = writer.end().await;
            }
            drop(place);
        })
    };
    let mut answer = Response::new(body);
    *answer.status_mut() = status;
    let headers = answer.headers_mut();
    headers.insert(ETAG, HeaderValue::from_str(&tag).expect("hexadecimal digits"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("private, no-cache"));
    if status == StatusCode::NOT_MODIFIED {
        return Ok(answer);
    }
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    if let (Some(size), Some(length)) = (size, length) {
        headers.insert(ACCEPT_RANGES, HeaderValue::from_static("bytes"));
        headers.insert(CONTENT_LENGTH, HeaderValue::from(length));
        if status == StatusCode::PARTIAL_CONTENT {
            let part = format!("bytes {}-{}/{size}", range.start, range.end - 1);
            headers.insert(CONTENT_RANGE, HeaderValue::from_str(&part).expect("digits"));
        }
    }
    Ok(answer)
}

/// `PUT …/envs/{name}/files?path=&create_parents=&mode=`
pub async fn put(api: &Arc<Api>, environment: &str, request: Request<Incoming>) -> Result<Response<Body>, ApiError> {
    let may = |principal: &Principal| !principal.scopes().read_only;
    let visit = match Visit::begin(api, "file.put", may, environment, &request).await {
        Err(refused) if refused.status() == 503 => {
            let edge = api.config.edge.now();
            let wait = Duration::from_secs(edge.body_timeout_secs);
            body::discard(request.into_body(), edge.body_bytes_max, wait).await;
            return Err(refused);
        }
        visit => visit?,
    };
    let act = visit.act();
    let written = receive(api, visit, request);
    let written = audited::recorded(api, act, written, |written| Outcome::new("ok").bytes(written.bytes, 0)).await?;
    let mut answer = json(&json!({
        "bytes": written.bytes, "sha256": written.sha256, "atomic": written.atomic, "created": written.created,
    }));
    if written.created {
        *answer.status_mut() = StatusCode::CREATED;
    }
    let tag = format!("\"{}\"", written.tag);
    answer.headers_mut().insert(ETAG, HeaderValue::from_str(&tag).expect("hexadecimal digits"));
    Ok(answer)
}

async fn receive(api: &Api, visit: Visit, request: Request<Incoming>) -> Result<Uploaded, ApiError> {
    let Visit { admitted, call, binding, path } = visit;
    let query = request.uri().query().unwrap_or_default();
    let parents = match query_parameter(query, "create_parents").as_deref() {
        None | Some("false" | "0") => false,
        Some("true" | "1") => true,
        Some(_) => return Err(ApiError::new(400, "bad_arguments", "create_parents: expected true or false")),
    };
    let if_none = match request.headers().get(IF_NONE_MATCH).map(HeaderValue::as_bytes) {
        None => false,
        Some(b"*") => true,
        Some(_) => return Err(ApiError::new(400, "bad_request", "If-None-Match: expected *")),
    };
    let upload =
        Upload { path, parents, mode: query_parameter(query, "mode"), if_match: if_match(request.headers())?, if_none };
    let bytes_max = api.config.now().tools.upload_bytes_max;
    let too_large = || ApiError::new(413, "body_too_large", format!("the body is larger than {bytes_max} bytes"));
    if request.body().size_hint().lower() > bytes_max {
        return Err(too_large());
    }
    let stall = Duration::from_secs(api.config.now().transfer.stall_secs);
    let mut body = request.into_body();
    let (pieces, content) = mpsc::channel(BLOCKS);
    let sent = async move {
        let mut bytes = 0;
        loop {
            let piece = timeout(stall, next(&mut body)).await.map_err(|_| BodyError::Timeout(stall))??;
            let Some(piece) = piece else { return Ok(()) };
            bytes += piece.len() as u64;
            if bytes > bytes_max {
                return Err(too_large());
            }
            // Where nobody takes it, the other future says why.
            if pieces.send(piece).await.is_err() {
                return std::future::pending().await;
            }
        }
    };
    let written = upload.write(&call, &binding, content).map(|written| written.map_err(ApiError::from));
    let ((), written) = tokio::select! {
        both = async { tokio::try_join!(sent, written) } => both?,
        refused = admitted.right.ended() => return Err(refused.into()),
    };
    Ok(written)
}

/// Whether a list of tags names this one, or any.
fn names(headers: &HeaderMap, name: HeaderName, tag: &str) -> bool {
    let lists = headers.get_all(name).iter().filter_map(|list| list.to_str().ok());
    lists.flat_map(|list| list.split(',')).map(str::trim).any(|known| {
        // Compared as RFC 9110 §13.1.2 has it: a weak tag is as good.
        known == "*" || known.strip_prefix("W/").unwrap_or(known) == tag
    })
}

/// What has to be there, without quotes.
fn if_match(headers: &HeaderMap) -> Result<Option<String>, ApiError> {
    let Some(value) = headers.get(IF_MATCH) else { return Ok(None) };
    let wrong = || ApiError::new(400, "bad_request", "If-Match: expected *, one ETag or one SHA-256, in quotes");
    let text = value.to_str().map_err(|_| wrong())?;
    if text == "*" {
        return Ok(Some("*".into()));
    }
    let tag = text.strip_prefix('"').and_then(|text| text.strip_suffix('"')).ok_or_else(wrong)?;
    let good = !tag.is_empty() && tag.bytes().all(|byte| byte.is_ascii_hexdigit() || byte == b'-');
    if good { Ok(Some(tag.to_ascii_lowercase())) } else { Err(wrong()) }
}

/// What a `Range` asks for.
#[derive(Debug, PartialEq, Eq)]
enum Wanted {
    Part(Range<u64>),
    /// Other units, several ranges, or nothing that reads as a range: the header is passed over (RFC 9110 §14.2).
    Everything,
    /// Nothing that the file has.
    Nothing,
}

fn parse_range(text: &str, size: u64) -> Wanted {
    let Some((first, last)) = text.strip_prefix("bytes=").and_then(|range| range.trim().split_once('-')) else {
        return Wanted::Everything;
    };
    let number = |text: &str| match text {
        "" => Some(None),
        digits if digits.bytes().all(|byte| byte.is_ascii_digit()) => Some(Some(digits.parse().unwrap_or(u64::MAX))),
        _ => None,
    };
    let part: Range<u64> = match (number(first), number(last)) {
        (Some(Some(first)), Some(None)) => first..size,
        (Some(Some(first)), Some(Some(last))) if first <= last => first..size.min(last.saturating_add(1)),
        (Some(None), Some(Some(count))) => size.saturating_sub(count)..size,
        _ => return Wanted::Everything,
    };
    if part.is_empty() { Wanted::Nothing } else { Wanted::Part(part) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_a_part_of_the_file_or_refused() {
        for (text, wanted) in [
            ("bytes=0-", Wanted::Part(0..10)),
            ("bytes=3-5", Wanted::Part(3..6)),
            ("bytes=3-99", Wanted::Part(3..10)),
            ("bytes=3-99999999999999999999999", Wanted::Part(3..10)),
            ("bytes=-4", Wanted::Part(6..10)),
            ("bytes=-40", Wanted::Part(0..10)),
            ("bytes=10-", Wanted::Nothing),
            ("bytes=-0", Wanted::Nothing),
            ("bytes=5-3", Wanted::Everything),
            ("bytes=-", Wanted::Everything),
            ("bytes=0-1,3-4", Wanted::Everything),
            ("bytes=+1-2", Wanted::Everything),
            ("lines=0-1", Wanted::Everything),
        ] {
            assert_eq!(parse_range(text, 10), wanted, "{text}");
        }
    }
}
