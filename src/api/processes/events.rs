//! Events: a session's output as Server-Sent Events, from where the caller left off to the exit.
//!
//! Owned by the body of one answer, which makes the next piece only when the one before was taken.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::{BoxFuture, Shared};
use futures_util::{FutureExt, stream};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::header::{ACCEPT, CACHE_CONTROL, CONTENT_TYPE, HeaderName, HeaderValue};
use hyper::{HeaderMap, Request, Response};
use serde::Serialize;
use serde_json::{Value, json};
use tokio::time::timeout;

use super::live::{Cut, Follow, Live, Step};
use super::{OutputQuery, bad_request};
use crate::api::error::ApiError;
use crate::api::{Api, credential, write_json};
use crate::edge::body::{Body, BrokenOff};
use crate::edge::listener::Ending;
use crate::journal::Page;
use crate::ops::metrics::Held;
use crate::session::view::{Chunk, lost};
use crate::session::{Place, Session};

/// Silence after which a comment is sent, so that proxies keep the connection and a caller that left is noticed.
const KEEP_ALIVE: Duration = Duration::from_secs(10);

/// When a client comes back after the gateway has said that it restarts, in milliseconds.
const RETRY_MS: u64 = 1000;

/// Whether the caller asks for events.
pub(super) fn wanted(headers: &HeaderMap) -> bool {
    let lists = headers.get_all(ACCEPT).iter().filter_map(|value| value.to_str().ok());
    lists.flat_map(|list| list.split(',')).any(|entry| {
        let media_type = entry.split(';').next().unwrap_or_default();
        media_type.trim().eq_ignore_ascii_case("text/event-stream")
    })
}

/// `GET …/processes/{sid}/output` with `Accept: text/event-stream`.
pub(super) async fn output(api: &Arc<Api>, id: &str, request: Request<Incoming>) -> Result<Response<Body>, ApiError> {
    let live = Live::admit(api, "events", id, &credential::of_request(&request)?).await?;
    let query = OutputQuery::parse(api, request.uri().query().unwrap_or_default())?;
    if query.wish.offset.is_some() || query.head_tail.is_some() {
        return Err(bad_request("events go by number: neither offset nor view"));
    }
    // A client that comes back by itself repeats the address of its first request, and this header overrules it.
    let since = match request.headers().get("last-event-id") {
        None => query.wish.since,
        Some(id) => {
            let number = id.to_str().ok().and_then(|id| id.parse().ok());
            number.ok_or_else(|| bad_request("Last-Event-ID: expected a number given as id before"))?
        }
    };
    let follow = Follow::new(live.session.clone(), since, query.wish.tag);
    let cut = live.cut.shared();
    let ending = Ending::when(cut.clone().map(drop));
    let events = Events { session: live.session, cut, follow, _place: live.place };
    let frames = stream::unfold(Some(events), |events| async {
        let (piece, events) = events?.next().await;
        Some((Ok::<_, BrokenOff>(Frame::data(Bytes::from(piece))), events))
    });
    let mut response = Response::new(BodyExt::boxed_unsync(StreamBody::new(frames)));
    response.extensions_mut().insert(ending);
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    // nginx would collect events until it has a buffer full of them.
    headers.insert(HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no"));
    Ok(response)
}

struct Events {
    session: Arc<Session>,
    cut: Shared<BoxFuture<'static, Cut>>,
    follow: Follow,
    _place: (Place, Held),
}

impl Events {
    /// The next piece, and what makes the one after it.
    async fn next(mut self) -> (Vec<u8>, Option<Self>) {
        let step = tokio::select! {
            biased;
            cut = &mut self.cut => return (farewell(&cut), None),
            step = timeout(KEEP_ALIVE, self.follow.next()) => step,
        };
        match step {
            Err(_) => {
                self.session.touch();
                (b": keep-alive\n\n".to_vec(), Some(self))
            }
            Ok(Ok(Step::Page(page))) => (page_events(&page), Some(self)),
            Ok(Ok(Step::Exit)) => (event(Vec::new(), "exit", None, &self.session.exit()), None),
            Ok(Err(error)) => (event(Vec::new(), "failed", None, &told(&error)), None),
        }
    }
}

fn page_events(page: &Page) -> Vec<u8> {
    let mut text = Vec::new();
    if let Some(hole) = &page.lost {
        text = event(text, "lost", Some(hole.seqs.end.saturating_sub(1)), &lost(hole));
    }
    for record in &page.records {
        let name = if record.gap.is_some() { "gap" } else { "chunk" };
        text = event(text, name, Some(record.seq), &Chunk::from(record));
    }
    text
}

fn farewell(cut: &Cut) -> Vec<u8> {
    match cut {
        Cut::Draining => event(format!("retry: {RETRY_MS}\n").into_bytes(), "draining", None, &json!({})),
        Cut::Forgotten => event(Vec::new(), "forgotten", None, &json!({})),
        // Whoever holds the credential is told as at any door.
        Cut::Refused(refused) => event(Vec::new(), "revoked", None, &told(&ApiError::from(refused.clone()))),
    }
}

fn told(error: &ApiError) -> Value {
    json!({ "code": error.code(), "message": error.message() })
}

/// Text with one event more; JSON on one line has no line breaks that would end it early.
fn event(mut text: Vec<u8>, name: &str, id: Option<u64>, data: &impl Serialize) -> Vec<u8> {
    if let Some(id) = id {
        text.extend_from_slice(format!("id: {id}\n").as_bytes());
    }
    text.extend_from_slice(format!("event: {name}\ndata: ").as_bytes());
    write_json(&mut text, data);
    text.extend_from_slice(b"\n\n");
    text
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::journal::{Gap, Lost, Record};

    #[test]
    fn events_are_wanted_by_whoever_lists_their_type() {
        let accepts = |value: &str| wanted(&[(ACCEPT, value.parse().unwrap())].into_iter().collect());
        assert!(accepts("text/event-stream"));
        assert!(accepts("application/json, Text/Event-Stream;q=0.9"));
        assert!(!accepts("*/*") && !accepts("text/event-streams") && !wanted(&HeaderMap::new()));
    }

    #[test]
    fn what_is_missing_has_events_of_its_own_that_move_the_cursor() {
        let gap = Record {
            seq: 9,
            tag: 1,
            offset: 30,
            mark: 0,
            bytes: Bytes::new(),
            gap: Some(Gap { bytes: Some(5), chunks: 2 }),
        };
        let lost = Some(Lost { seqs: 3..9, resume: vec![(1, 30)] });
        let page = Page { records: vec![gap], next_seq: 9, first_available_seq: 9, lost, end: true };
        assert_eq!(
            String::from_utf8(page_events(&page)).unwrap(),
            "id: 8\nevent: lost\ndata: {\"from_seq\":3,\"resume_offsets\":{\"stderr\":30},\"to_seq\":9}\n\n\
             id: 9\nevent: gap\ndata: {\"data_b64\":\"\",\"gap\":{\"bytes\":5,\"chunks\":2},\"offset\":30,\"seq\":9,\
             \"stream\":\"stderr\"}\n\n"
        );
    }
}
