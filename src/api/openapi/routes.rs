//! What each route of the router's table takes and answers. A route that is not described here does not compile.

use rmcp::model::ProtocolVersion;
use serde_json::{Value, json};

use super::failures::*;
use super::operation::{CALLER, Caller, Operation, STREAM, Tag};
use super::{Schemas, object, reference};
use crate::api::processes::{HeadTail, Output, StdinBody, TerminateBody};
use crate::edge::router::Route;
use crate::protocol::compat::{
    BindExecutor, ConnectedExecutor, CreateTransfer, CreatedTransfer, RegisterExecutor, RegisteredExecutor, RevokeTurn,
};
use crate::protocol::ids::{ExecutorId, UserId, WorkspaceId};
use crate::protocol::rest::{
    ConnectResponse, DIRECT_TRANSPORT, EnvList, HarnessKey, KEY_SUITE, RegisterResponse, SECURITY_PROFILE, ToolResult,
    ValidateRequest, ValidateResponse,
};
use crate::session::view::Description;
use crate::tools::Tool;

const SERVICE: &[Caller] = &[Caller::InternalSecret];
const TRANSFERRER: &[Caller] = &[Caller::TransferTicket, Caller::Token];
const SOCKETS: &[Caller] = &[Caller::ExecutorTicket, Caller::Token, Caller::TokenInQuery, Caller::TokenInProtocol];

/// The operation of a route, whichever of its paths and methods it is asked by.
pub(super) fn operation(route: Route, schemas: &mut Schemas) -> Operation {
    match route {
        Route::EnvList => Operation::new(Tag::Environments, CALLER)
            .answers_json(200, "Those that are connected.", schemas.answer::<EnvList>())
            .fails(&[AUTH, PACE, DRAINING, STORE]),
        Route::ToolCall => Operation::new(Tag::Environments, CALLER)
            .says(
                "What the tool could not do is a result with `isError: true` and status 200; an error means that the \
                 call did not get that far. After 15 s the status is sent, and a space every 10 s until the result; \
                 what goes wrong from then on is told in the result, its code in `structuredContent.code`.",
            )
            .header("Idempotency-Key", text(), "Of `exec_command`: the same key gives the process of the first call.")
            .takes(&tool_call())
            .answers_json(200, "The tool's result.", tool_result(schemas))
            .fails(&[AUTH, PACE, DRAINING, PLACE, BODY, READ_ONLY, CALL, AUDIT, REACH, SESSION, STDIN]),
        Route::FileGet => file(Operation::new(Tag::Files, CALLER))
            .header("Range", text(), "`bytes=FIRST-LAST`; of several ranges none is looked at.")
            .header("If-Range", text(), "An `ETag`: `Range` holds for this content only.")
            .header("If-None-Match", text(), "`ETag`s of contents that are not sent again.")
            .answers_as(200, "application/octet-stream", "The content; one that breaks off was not read to its end.")
            .with(200, "Accept-Ranges", "AcceptRanges")
            .with(200, "ETag", "ETag")
            .answers_as(206, "application/octet-stream", "The part that was asked for.")
            .with(206, "Content-Range", "ContentRange")
            .with(206, "ETag", "ETag")
            .answers(304, "The content is known.")
            .with(304, "ETag", "ETag")
            .with(416, "Content-Range", "ContentRange")
            .fails(&[RANGE]),
        Route::FilePut => {
            let content =
                json!({ "anyOf": [{ "const": "*" }, { "type": "string", "pattern": "^\"[0-9A-Fa-f-]+\"$" }] });
            let written = object(json!({
                "bytes": { "type": "integer", "minimum": 0 },
                "sha256": { "type": "string" },
                "atomic": { "type": "boolean" },
                "created": { "type": "boolean" },
            }));
            file(Operation::new(Tag::Files, CALLER))
                .says("The content is put in its place whole, or not at all.")
                .query(
                    "create_parents",
                    json!({ "type": "string", "enum": ["true", "false", "1", "0"] }),
                    "Whether missing directories are made.",
                )
                .query("mode", json!({ "type": "string", "pattern": "^[0-7]{1,4}$" }), "Permissions in octal digits.")
                .header("If-Match", content, "`*`, the `ETag` or the SHA-256 that the file has to have, in quotes.")
                .header("If-None-Match", json!({ "const": "*" }), "`*`: only a file that is not there is written.")
                .takes_bytes()
                .answers_json(200, "The file has another content.", written.clone())
                .with(200, "ETag", "ETag")
                .answers_json(201, "There is a new file.", written)
                .with(201, "ETag", "ETag")
                .fails(&[BODY, READ_ONLY])
        }
        Route::ProcessList => {
            let list = object(json!({ "processes": { "type": "array", "items": schemas.answer::<Description>() } }));
            Operation::new(Tag::Processes, CALLER).answers_json(200, "Oldest first.", list).fails(&[AUTH, PACE])
        }
        Route::ProcessShow => Operation::new(Tag::Processes, CALLER)
            .answers_json(200, "The session.", schemas.answer::<Description>())
            .fails(&[AUTH, PACE, KNOWN_SESSION]),
        Route::ProcessForget => Operation::new(Tag::Processes, CALLER)
            .answers_json(200, "Its process is ended, its output gone.", object(json!({ "ok": { "const": true } })))
            .fails(&[AUTH, PACE, KNOWN_SESSION, READ_ONLY, AUDIT]),
        Route::ProcessOutput => {
            let output = json!({ "anyOf": [schemas.answer::<Output<'_>>(), schemas.answer::<HeadTail<'_>>()] });
            output_query(Operation::new(Tag::Processes, STREAM))
                .says("`Accept: text/event-stream` asks for events until the end, as HTML has them.")
                .query("wait_ms", number(), "How long to wait where there is nothing new.")
                .query("max_bytes", number(), "Bytes of output at most.")
                .query("offset", number(), "What follows this byte of `stream`, rather than `since`.")
                .query("view", json!({ "enum": ["head_tail"] }), "The two ends of the output.")
                .query("bytes", number(), "Bytes of the two ends together.")
                .header("Last-Event-ID", text(), "Goes before `since`, for events.")
                .answers_json(200, "A page.", output)
                .answers_as(200, "text/event-stream", "Events `chunk`, `gap`, `lost`, and at last `exit`.")
                .fails(&[AUTH, PACE, DRAINING, QUERY, KNOWN_SESSION, LIVE])
        }
        Route::ProcessAttach => output_query(Operation::new(Tag::Processes, STREAM))
            .opens("Messages `chunk`, `gap`, `lost`, `exit` come, `stdin` and `terminate` may be sent, all in JSON.")
            .fails(&[AUTH, PACE, DRAINING, QUERY, KNOWN_SESSION, LIVE, UPGRADE, AUDIT]),
        Route::ProcessStdin => {
            let taken = json!({
                "ok": { "const": true },
                "accepted": { "type": "integer", "minimum": 0 },
                "eof": { "type": "boolean" },
            });
            Operation::new(Tag::Processes, CALLER)
                .says("With `offset`, bytes that were accepted before are left out: a request may be sent again.")
                .may_take(&schemas.request::<StdinBody>())
                .answers_json(200, "All bytes were accepted.", object(taken))
                .fails(&[AUTH, PACE, DRAINING, BODY, KNOWN_SESSION, READ_ONLY, AUDIT, STDIN, &[(400, "bad_base64")]])
        }
        Route::ProcessTerminate => {
            let ended = json!({
                "ok": { "const": true },
                "state": { "type": "string" },
                "exit_code": { "type": ["integer", "null"] },
            });
            Operation::new(Tag::Processes, CALLER)
                .may_take(&schemas.request::<TerminateBody>())
                .answers_json(200, "It was asked to end, and where that is soon, has ended.", object(ended))
                .fails(&[AUTH, PACE, BODY, KNOWN_SESSION, READ_ONLY, AUDIT])
        }
        Route::RegisterCodex => {
            let encrypted = object(json!({
                "security_profile": { "const": SECURITY_PROFILE },
                "executor_public_key": good_key(schemas),
            }));
            let unused = json!({ "anyOf": [schemas.request::<HarnessKey>(), { "type": "null" }] });
            let open = json!({
                "type": "object",
                "properties": { "security_profile": { "type": "null" }, "executor_public_key": unused },
            });
            register(&[Caller::ExecutorToken], schemas).may_take(&json!({ "anyOf": [encrypted, open] }))
        }
        Route::RegisterAgentx => {
            let body = json!({ "description": "Nothing of it is looked at." });
            register(&[Caller::ExecutorToken], schemas).may_take(&body)
        }
        Route::RegisterDirect => register(&[Caller::ExecutorSignature], schemas)
            .takes(&object(json!({ "transport": { "const": DIRECT_TRANSPORT } }))),
        Route::Validate => Operation::new(Tag::Executors, &[Caller::ExecutorToken])
            .takes(&schemas.request::<ValidateRequest>())
            .answers_json(200, "Whether the harness may.", schemas.answer::<ValidateResponse>())
            .fails(&[BODY, EXECUTOR]),
        Route::Connect => Operation::new(Tag::Harnesses, CALLER)
            .takes(&object(json!({ "harness_public_key": good_key(schemas) })))
            .answers_json(200, "What to dial, for one key and 60 s.", schemas.answer::<ConnectResponse>())
            .fails(&[AUTH, PACE, DRAINING, BODY, HARNESS, NOT_ENCRYPTED]),
        Route::Bridge => socket(),
        Route::CloudRelay => socket(),
        Route::Connected => {
            let list = json!({ "type": "array", "items": schemas.answer::<ConnectedExecutor>() });
            let operation = Operation::new(Tag::Services, CALLER);
            operation.answers_json(200, "Those that are connected.", list).fails(&[AUTH, STORE])
        }
        Route::RevokeTurn => Operation::new(Tag::Services, &[Caller::SharedSecret])
            .takes(&schemas.request::<RevokeTurn>())
            .answers(204, "Its cap-tokens are good for nothing any more.")
            .fails(&[SECRET, BODY, OPERATE, REVOCATIONS]),
        Route::ExecutorRegister => Operation::new(Tag::Services, SERVICE)
            .header("X-User-Id", schemas.request::<UserId>(), "The person whose machine it is; has to be there.")
            .takes(&schemas.request::<RegisterExecutor>())
            .answers_json(201, "Its id.", schemas.answer::<RegisteredExecutor>())
            .fails(&[SECRET, BODY, OPERATE]),
        Route::ExecutorDelete => Operation::new(Tag::Services, SERVICE)
            .answers(204, "It is gone, with its bindings and its socket; also where it never was.")
            .fails(&[SECRET, OPERATE]),
        Route::ExecutorBind => Operation::new(Tag::Services, SERVICE)
            .path("wid", schemas.request::<WorkspaceId>())
            .header("X-User-Id", schemas.request::<UserId>(), "A person, who can bind their own executors only.")
            .takes(&schemas.request::<BindExecutor>())
            .answers_json(201, "The workspace may reach it.", object(json!({ "status": { "const": "ok" } })))
            .fails(&[SECRET, BODY, OPERATE, STORE]),
        Route::ExecutorsBound => {
            let list = json!({ "type": "array", "items": schemas.answer::<ConnectedExecutor>() });
            Operation::new(Tag::Services, SERVICE)
                .path("wid", schemas.request::<WorkspaceId>())
                .answers_json(200, "All that are bound, connected or not.", list)
                .fails(&[SECRET, QUERY, STORE])
        }
        Route::ExecutorUnbind => Operation::new(Tag::Services, SERVICE)
            .path("wid", schemas.request::<WorkspaceId>())
            .answers(204, "The workspace reaches it no longer; also where it never did.")
            .fails(&[SECRET, OPERATE]),
        Route::Mcp => Operation::new(Tag::Mcp, CALLER)
            .says("`Accept` has to list `application/json` and `text/event-stream`.")
            .header("Mcp-Session-Id", text(), "The name that `initialize` was answered with.")
            .header("Mcp-Protocol-Version", json!({ "enum": ProtocolVersion::KNOWN_VERSIONS }), "As agreed on.")
            .takes(&json!({
                "type": "object",
                "properties": {
                    "jsonrpc": { "const": "2.0" },
                    "id": { "type": ["string", "integer"] },
                    "method": { "type": "string" },
                    "params": { "type": "object" },
                },
                "required": ["jsonrpc", "method"],
            }))
            .answers_json(200, "The answer.", json!({ "type": "object" }))
            .answers_as(200, "text/event-stream", "The same as an event, after notifications or a silence.")
            .with(200, "Mcp-Session-Id", "McpSessionId")
            .answers(202, "A notification was taken.")
            .answers_json(400, "No message of the protocol.", reference("RpcError"))
            .answers_json(404, "No such method.", reference("RpcError"))
            .answers_json(406, "`Accept` lacks a media type.", reference("RpcError"))
            .with(401, "WWW-Authenticate", "Challenge")
            .fails(&[AUTH, PACE, DRAINING, PLACE, BODY, MCP]),
        Route::ProtectedResource => {
            let texts = json!({ "type": "array", "items": text() });
            let mut document =
                object(json!({ "resource": text(), "resource_name": text(), "bearer_methods_supported": texts }));
            document["properties"]["authorization_servers"] = texts;
            Operation::new(Tag::Mcp, &[]).answers_json(200, "As RFC 9728 has it.", document)
        }
        Route::TransferCreate => Operation::new(Tag::Transfers, &[Caller::SharedSecret, Caller::Token])
            .takes(&schemas.request::<CreateTransfer>())
            .answers_json(201, "The ticket, which is the bearer of both sides.", schemas.answer::<CreatedTransfer>())
            .fails(&[SECRET, BODY, DRAINING, NEW_TRANSFER]),
        Route::TransferPut => {
            let bytes = json!({ "type": "integer", "minimum": 0 });
            let broken = object(json!({ "bytes": bytes, "error": { "type": "string" } }));
            Operation::new(Tag::Transfers, TRANSFERRER)
                .takes_bytes()
                .answers_json(
                    200,
                    "The receiver took all of it.",
                    object(json!({ "bytes": bytes, "status": { "const": "ok" } })),
                )
                .answers_json(500, "It broke off after so many bytes.", broken)
                .fails(&[TRANSFER, READ_ONLY, DRAINING, BODY])
        }
        Route::TransferGet => Operation::new(Tag::Transfers, TRANSFERRER)
            .answers_as(200, "application/octet-stream", "What the sender sends; broken off where that breaks off.")
            .fails(&[TRANSFER, DRAINING]),
        Route::Health => Operation::new(Tag::Gateway, &[]).answers_as(200, "text/plain", "It is alive."),
        Route::OpenApi => {
            Operation::new(Tag::Gateway, &[]).answers_json(200, "OpenAPI 3.1.", json!({ "type": "object" }))
        }
    }
}

fn number() -> Value {
    json!({ "type": "integer", "minimum": 0, "maximum": u64::MAX })
}

fn text() -> Value {
    json!({ "type": "string" })
}

/// One tool call: the arguments are those of the tool.
fn tool_call() -> Value {
    let calls = Tool::ALL.iter().map(|tool| {
        let needs_arguments = tool.input_schema()["required"].as_array().is_some_and(|required| !required.is_empty());
        let arguments = reference(&format!("{}.arguments", tool.name()));
        let arguments = if needs_arguments { arguments } else { json!({ "anyOf": [arguments, { "type": "null" }] }) };
        json!({
            "title": tool.name(),
            "description": tool.description(),
            "type": "object",
            "properties": { "tool": { "const": tool.name() }, "arguments": arguments },
            "required": if needs_arguments { &["tool", "arguments"][..] } else { &["tool"] },
        })
    });
    json!({ "oneOf": calls.collect::<Vec<_>>() })
}

fn tool_result(schemas: &mut Schemas) -> Value {
    let mut answers: Vec<Value> = Tool::ALL.iter().map(|tool| reference(&format!("{}.answer", tool.name()))).collect();
    answers.push(object(json!({ "code": { "type": "string", "description": "What was not possible." } })));
    let structured = json!({ "properties": { "structuredContent": { "anyOf": answers } } });
    json!({ "allOf": [schemas.answer::<ToolResult>(), structured] })
}

/// What reading and writing a file have in common.
fn file(operation: Operation) -> Operation {
    operation
        .needs("path", text(), "Relative paths and `~` are taken on the executor.")
        .fails(&[AUTH, PACE, DRAINING, PLACE, AUDIT, REACH, FILE])
}

/// Which output is wanted, by number.
fn output_query(operation: Operation) -> Operation {
    operation.query("since", text(), "What follows this number; what is none counts from the start.").query(
        "stream",
        json!({ "enum": ["stdout", "stderr", "pty"] }),
        "One stream of the process, or all.",
    )
}

/// A key that is looked at, rather than compared.
fn good_key(schemas: &mut Schemas) -> Value {
    let form = json!({ "properties": {
        "suite": { "const": KEY_SUITE },
        "x25519_public_key": { "pattern": "^[A-Za-z0-9+/]{42}[AEIMQUYcgkosw048]=$" },
        "mlkem768_public_key": { "pattern": "^[A-Za-z0-9+/]{1578}[AEIMQUYcgkosw048]=$" },
    } });
    json!({ "allOf": [schemas.request::<HarnessKey>(), form] })
}

fn register(callers: &'static [Caller], schemas: &mut Schemas) -> Operation {
    Operation::new(Tag::Executors, callers)
        .path("id", schemas.request::<ExecutorId>())
        .says("Held and tried again inside for 8 s rather than refused, since a stock executor ends when it is.")
        .answers_json(200, "What to dial.", schemas.answer::<RegisterResponse>())
        .fails(&[BODY, EXECUTOR, REGISTER, AUDIT])
}

/// A socket of an executor or a harness, told apart by their credentials.
fn socket() -> Operation {
    Operation::new(Tag::Harnesses, SOCKETS)
        .says(
            "With a ticket and `reg` it is an executor's, else a harness's: plain JSON-RPC, plain relay frames, or \
             encrypted ones with the authorization that `connect` has answered.",
        )
        .query("reg", text(), "Of an executor: its registration.")
        .query("t", text(), "Of an executor: `direct` on that transport.")
        .query("by", text(), "Of an encrypted harness: as `connect` has answered it.")
        .opens("The conversation begins.")
        .with(404, "X-Codex-Rendezvous-Rejection-Reason", "Rejection")
        .with(409, "X-Codex-Rendezvous-Rejection-Reason", "Rejection")
        .with(426, "Upgrade", "Upgrade")
        .fails(&[AUTH, PACE, DRAINING, AUDIT, UPGRADE, LINK, HARNESS, HARNESS_SOCKET])
}
