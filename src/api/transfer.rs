//! The doors of transfers (connectors-api.md §2.6): a service makes one, one client puts, the other gets.
//!
//! Bytes pass as they come, a few pieces ahead of the receiver. What breaks one side off is seen by the other as broken
//! off, never as an end.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use http_body_util::BodyExt;
use hyper::body::{Body as HttpBody, Incoming};
use hyper::header::{CACHE_CONTROL, CONTENT_TYPE, HeaderValue, X_CONTENT_TYPE_OPTIONS};
use hyper::{Request, Response, StatusCode};
use serde_json::{Value, json};
use tokio::time::timeout;
use zeroize::Zeroizing;

use super::audited::{act, failed, recorded};
use super::compat::{admit_service, created, read, unauthorized};
use super::error::ApiError;
use super::{Api, TRANSFERS, asked_as, draining, http_base, json, read_only};
use crate::audit::{Act, Outcome};
use crate::auth::{AuthError, bearer};
use crate::edge::body::{Body, BodyError};
use crate::edge::peer;
use crate::protocol::compat::{CreateTransfer, CreatedTransfer};
use crate::protocol::ids::{ExecutorId, WorkspaceId};
use crate::time::rfc3339;
use crate::transfer::{Created, Order, Side, Transfer, TransferError, Upload, Wait};

/// What of a body is read while its receiver is not there, in bytes: enough to see a short one's sender hang up.
const HELD_BYTES_MAX: usize = 256 * 1024;

/// `POST /api/exec-gateway/relay/create`: for a service, or for a caller whose credential names the same workspace.
pub async fn create(api: &Arc<Api>, request: Request<Incoming>) -> Result<Response<Body>, ApiError> {
    let shown = bearer(request.headers()).map(|shown| Zeroizing::new(shown.to_owned()));
    let service = admit_service(api, shown.as_ref().ok().map(|shown| shown.as_str()));
    let head = request.headers();
    let (caller, act) = match (&service, &shown) {
        (Err(refused), Ok(shown)) if refused.status() == 401 => {
            let principal = api.corridor.auth.principal(shown).await.map_err(|_| unauthorized("unauthorized"))?;
            if principal.scopes().read_only {
                return Err(read_only());
            }
            let act = act("transfer.create", &principal, head);
            (Some(principal), act)
        }
        _ => (service.map(|()| None)?, Act::new("transfer.create").by_the("service").asked_as(asked_as(head))),
    };
    api.refuse_while_draining()?;
    api.memory.admit()?;
    let (head, body) = request.into_parts();
    let base = http_base(api, &head);
    let CreateTransfer { workspace_id: workspace, source_exe_id, dest_exe_id, ttl_seconds, max_bytes } =
        read(api, Request::from_parts(head, body)).await?;
    let of_caller = caller.is_none_or(|principal| *principal.workspace() == workspace);
    let executor = async |id: &str| -> Result<ExecutorId, ApiError> {
        let refused = || ApiError::new(403, "forbidden", format!("executor not in workspace: {id}"));
        let executor = ExecutorId::new(id).map_err(|_| refused())?;
        if of_caller && is_bound(api, &workspace, &executor).await? { Ok(executor) } else { Err(refused()) }
    };
    let (source, destination) = (executor(&source_exe_id).await?, executor(&dest_exe_id).await?);
    let ttl = (ttl_seconds > 0).then(|| Duration::from_secs(ttl_seconds));
    let bytes_max = (max_bytes > 0).then_some(max_bytes);
    let order = Order { workspace, source, destination, ttl, bytes_max };
    let act = act.of_workspace(&order.workspace).about(ends_of(&order));
    let made = async { Ok(api.transfers.create(order)?) };
    let Created { ticket, ttl, .. } =
        recorded(api, act, made, |made| Outcome::new("ok").with("transfer", made.transfer.name())).await?;
    let url = format!("{base}{TRANSFERS}{}", *ticket);
    Ok(created(&CreatedTransfer {
        ticket: ticket.to_string(),
        upload_url: url.clone(),
        download_url: url,
        expires_at: rfc3339(SystemTime::now() + ttl),
    }))
}

/// Between which executors, as it is recorded.
fn ends_of(order: &Order) -> Value {
    json!({ "source": order.source, "destination": order.destination })
}

async fn is_bound(api: &Api, workspace: &WorkspaceId, executor: &ExecutorId) -> Result<bool, ApiError> {
    let stored = api.corridor.store.executors(Some(workspace)).await?;
    Ok(stored.iter().any(|(known, _)| known.id == *executor))
}

/// A client at its transfer.
struct Admitted {
    transfer: Arc<Transfer>,
    /// What it is about to do, as it is recorded.
    act: Act,
    /// Comes when the credential that it showed is taken away.
    right_ends: BoxFuture<'static, ()>,
}

/// The ticket itself is credential enough; a workspace's own opens its transfers too.
async fn admitted(api: &Api, ticket: &str, side: Side, request: &Request<Incoming>) -> Result<Admitted, ApiError> {
    let revocations = api.corridor.auth.revocations();
    let shown = bearer(request.headers()).map_err(|_| unauthorized("unauthorized"))?;
    let (workspace, right_ends) = if shown == ticket {
        (None, std::future::pending().boxed())
    } else {
        let shown = Zeroizing::new(shown.to_owned());
        let principal = api.corridor.auth.principal(&shown).await.map_err(|error| match error {
            AuthError::Unavailable { .. } => ApiError::from(error),
            _ => unauthorized("unauthorized"),
        })?;
        if side == Side::Put && principal.scopes().read_only {
            return Err(read_only());
        }
        let ends = async move { drop(revocations.end_of(&shown).await) };
        (Some(principal), ends.boxed())
    };
    let transfer = api.transfers.find(ticket, workspace.as_ref().map(|principal| principal.workspace()))?;
    api.refuse_while_draining()?;
    let action = match side {
        Side::Put => "transfer.put",
        Side::Get => "transfer.get",
    };
    let by = match &workspace {
        Some(principal) => act(action, principal, request.headers()),
        None => {
            let by_ticket = Act::new(action).by_the("ticket").asked_as(asked_as(request.headers()));
            by_ticket.of_workspace(&transfer.order().workspace)
        }
    };
    let mut about = ends_of(transfer.order());
    about["transfer"] = transfer.name().into();
    let act = by.came_from(peer::client(request.headers(), request.extensions().get())).about(about);
    Ok(Admitted { transfer, act, right_ends })
}

/// `PUT /relay/{ticket}`: answered when the receiver has taken everything.
pub async fn put(api: &Arc<Api>, ticket: &str, request: Request<Incoming>) -> Result<Response<Body>, ApiError> {
    let Admitted { transfer, act, right_ends } = admitted(api, ticket, Side::Put, &request).await?;
    let entry = api.audit.begin(act).await?;
    let mut source = Source {
        announced: request.body().size_hint().exact(),
        body: request.into_body(),
        held: Vec::new(),
        whole: false,
        stall: Duration::from_secs(api.config.now().transfer.stall_secs),
    };
    let met = tokio::select! {
        upload = source.meet(&transfer) => upload,
        () = api.draining.cancelled() => Err(draining()),
    };
    let upload = match met {
        Ok(upload) => upload,
        Err(error) => {
            entry.end(failed(&error));
            return Err(error);
        }
    };
    let mut bytes = 0;
    let moved = tokio::select! {
        biased;
        () = transfer.withdrawn() => Err("the transfer was withdrawn".into()),
        () = right_ends => Err("the credential was revoked".into()),
        moved = source.pour(upload, transfer.bytes_max(), &mut bytes) => moved,
    };
    let outcome = if moved.is_ok() { "ok" } else { "broken_off" };
    api.metrics.transfers_ended.inc([outcome]);
    api.metrics.transferred.add(bytes);
    entry.end(Outcome::new(outcome).bytes(bytes, 0));
    Ok(match moved {
        Ok(()) => json(&json!({ "bytes": bytes, "status": "ok" })),
        Err(error) => {
            let mut answer = json(&json!({ "bytes": bytes, "error": error }));
            *answer.status_mut() = StatusCode::INTERNAL_SERVER_ERROR;
            answer
        }
    })
}

/// `GET /relay/{ticket}`
pub async fn get(api: &Arc<Api>, ticket: &str, request: Request<Incoming>) -> Result<Response<Body>, ApiError> {
    let Admitted { transfer, act, right_ends } = admitted(api, ticket, Side::Get, &request).await?;
    let met = async {
        tokio::select! {
            download = transfer.get() => Ok(download?),
            () = api.draining.cancelled() => Err(draining()),
        }
    };
    // How it goes on from here stands in the record of its sender.
    let download = recorded(api, act, met, |_| Outcome::new("ok")).await?;
    let half = download.half;
    let mut answer = Response::new(download.body.pumped_by(async move {
        right_ends.await;
        // The sender lets go then, and so this answer is broken off.
        transfer.cut();
        drop(half);
    }));
    let headers = answer.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    Ok(answer)
}

/// What the sender sends.
struct Source {
    body: Incoming,
    announced: Option<u64>,
    /// Read before the receiver came.
    held: Vec<Bytes>,
    /// Whether nothing of the body is left.
    whole: bool,
    stall: Duration,
}

impl Source {
    /// Waits for the receiver. The body is read on for a while, since only who is read is seen to hang up.
    async fn meet(&mut self, transfer: &Transfer) -> Result<Upload, ApiError> {
        let wait = Arc::new(Wait::default());
        let mut meeting = std::pin::pin!(transfer.put(self.announced, wait.clone()));
        loop {
            let held: usize = self.held.iter().map(Bytes::len).sum();
            let deaf = held >= HELD_BYTES_MAX && !self.whole;
            if deaf {
                wait.is_deaf();
            }
            tokio::select! {
                biased;
                upload = &mut meeting => return upload.map_err(|error| too_large(error, transfer)),
                piece = next(&mut self.body), if !deaf && !self.whole => match piece? {
                    Some(piece) => self.held.push(piece),
                    None => self.whole = true,
                },
            }
        }
    }

    /// Passes everything on. Dropping it breaks the receiver off.
    async fn pour(mut self, upload: Upload, bytes_max: u64, bytes: &mut u64) -> Result<(), String> {
        let mut held = std::mem::take(&mut self.held).into_iter();
        let left = |_| "the GET side left".to_owned();
        loop {
            let piece = match held.next() {
                Some(piece) => Some(piece),
                None if self.whole => None,
                None => tokio::select! {
                    piece = timeout(self.stall, next(&mut self.body)) => match piece {
                        Ok(piece) => piece.map_err(|error| error.to_string())?,
                        Err(_) => return Err(format!("the PUT side sent nothing for {} s", self.stall.as_secs())),
                    },
                    // Be it that it has everything already.
                    () = upload.writer.left() => None,
                },
            };
            let Some(mut piece) = piece else { break };
            let room = bytes_max - *bytes;
            let fits = piece.len() as u64 <= room;
            if !fits {
                piece.truncate(usize::try_from(room).unwrap_or(usize::MAX));
            }
            *bytes += piece.len() as u64;
            if !piece.is_empty() {
                upload.writer.write(piece).await.map_err(left)?;
            }
            if !fits {
                return Err(more_than(bytes_max));
            }
        }
        upload.finish().await.map_err(left)
    }
}

/// The next bytes of a body; `None` at its end.
pub(super) async fn next(body: &mut Incoming) -> Result<Option<Bytes>, BodyError> {
    loop {
        match body.frame().await {
            None => return Ok(None),
            Some(Err(_)) => return Err(BodyError::Broken),
            Some(Ok(frame)) => {
                if let Ok(bytes) = frame.into_data() {
                    return Ok(Some(bytes));
                }
            }
        }
    }
}

fn more_than(bytes_max: u64) -> String {
    format!("more than {bytes_max} bytes")
}

/// A sender that announces more than the transfer carries fails before its first byte.
fn too_large(error: TransferError, transfer: &Transfer) -> ApiError {
    match error {
        TransferError::Failed(Side::Put) => ApiError::new(413, "body_too_large", more_than(transfer.bytes_max())),
        error => error.into(),
    }
}
