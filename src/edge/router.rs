//! Method and path → door: every endpoint of the gateway in one list.

use std::collections::BTreeMap;

use hyper::Method;
use matchit::{Match, Params};

/// How errors of a route are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Envelope {
    /// `{"error":{"code","message"}}`
    Json,
    /// `{"error":"message"}`
    Message,
    /// `{"jsonrpc":"2.0","error":{"code","message","data"}}`
    Rpc,
    /// The message alone.
    Text,
}

/// What the table says of one route.
#[derive(Debug)]
pub struct Row {
    /// The route.
    pub route: Route,
    /// Its name in metrics.
    pub name: &'static str,
    /// One sentence for people.
    pub about: &'static str,
    /// Methods that it answers; `HEAD` where it knows the length of what `GET` would send.
    pub methods: &'static [Method],
    /// Its paths, the preferred one first, with `{}` around their parameters.
    pub paths: &'static [&'static str],
    /// How its errors are written.
    pub envelope: Envelope,
    /// The door by which a request came whose answer says where its time went.
    pub timed_door: Option<&'static str>,
}

/// Makes the routes of the table, so that none is without methods, paths, envelope and sentence.
macro_rules! table {
    ($(
        #[doc = $about:literal]
        $route:ident $name:literal $($method:ident)+ [$($path:literal)+] $envelope:ident $($door:literal)?;
    )+) => {
        /// What an API request asks for.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Route {
            $(#[doc = $about] $route,)+
        }

        impl Route {
            /// Names of all routes in metrics, in the order of the table; the first is that of no route.
            pub const NAMES: &[&str] = &[Self::NONE, $($name),+];
        }

        /// Every endpoint.
        pub static TABLE: &[Row] = &[$(
            Row {
                route: Route::$route,
                name: $name,
                about: $about,
                methods: &[$(Method::$method),+],
                paths: &[$($path),+],
                envelope: Envelope::$envelope,
                timed_door: table!(@ $($door)?),
            },
        )+];
    };
    (@ $door:literal) => { Some($door) };
    (@) => { None };
}

// WebSocket doors speak plain text where they refuse (connectors-api.md §2.4), those of services a text in JSON (§2.6,
// §2.7). The older Python client still calls /api/sdk.
table! {
    /// The environments of a workspace.
    EnvList "env_list" POST ["/api/connectors/envs/list" "/api/sdk/envs/list"] Json "rest";
    /// One tool call.
    ToolCall "tool_call" POST ["/api/connectors/envs/{name}/tool/call" "/api/sdk/envs/{name}/tool/call"] Json "rest";
    /// The content of a file.
    FileGet "file_get" GET HEAD ["/api/connectors/envs/{name}/files" "/api/sdk/envs/{name}/files"] Json "files";
    /// A new content for a file.
    FilePut "file_put" PUT ["/api/connectors/envs/{name}/files" "/api/sdk/envs/{name}/files"] Json "files";
    /// The process sessions of a workspace.
    ProcessList "process_list" GET ["/api/connectors/processes" "/api/sdk/processes"] Json "processes";
    /// One process session.
    ProcessShow "process_show" GET ["/api/connectors/processes/{sid}" "/api/sdk/processes/{sid}"] Json "processes";
    /// A process session is ended and forgotten.
    ProcessForget "process_forget" DELETE
        ["/api/connectors/processes/{sid}" "/api/sdk/processes/{sid}"] Json "processes";
    /// Output of a process session.
    ProcessOutput "process_output" GET
        ["/api/connectors/processes/{sid}/output" "/api/sdk/processes/{sid}/output"] Json "processes";
    /// A caller attaches to a process session.
    ProcessAttach "process_attach" GET
        ["/api/connectors/processes/{sid}/attach" "/api/sdk/processes/{sid}/attach"] Json;
    /// Input for a process session.
    ProcessStdin "process_stdin" POST
        ["/api/connectors/processes/{sid}/stdin" "/api/sdk/processes/{sid}/stdin"] Json "processes";
    /// A process session is to end.
    ProcessTerminate "process_terminate" POST
        ["/api/connectors/processes/{sid}/terminate" "/api/sdk/processes/{sid}/terminate"] Json "processes";
    /// An executor registers: codex.
    RegisterCodex "register_codex" POST ["/cloud/environment/{id}/register" "/cloud/executor/{id}/register"] Json;
    /// An executor registers: agentx.
    RegisterAgentx "register_agentx" POST ["/agentx/environment/{id}/register"] Json;
    /// An executor registers: codex on its direct transport.
    RegisterDirect "register_direct" POST ["/cloud/environment/{id}/direct/register"] Json;
    /// An executor asks whether to trust a harness.
    Validate "validate" POST ["/cloud/environment/{id}/validate" "/cloud/executor/{id}/validate"] Json;
    /// A harness asks for the way to an encrypted executor.
    Connect "connect" POST ["/cloud/environment/{id}/connect"] Json;
    /// An executor or a harness opens its socket.
    Bridge "bridge" GET ["/bridge/{id}" "/codex-exec/{id}" "/agentx/{id}"] Text;
    /// A registered executor, or a harness of it, opens its socket.
    CloudRelay "cloud_relay" GET ["/cloud/relay/{registration}"] Text;
    /// A service asks who is connected.
    Connected "connected" GET ["/api/exec-gateway/connected"] Message;
    /// A service ends a turn.
    RevokeTurn "revoke_turn" POST ["/api/exec-gateway/revoke-turn"] Message;
    /// A service makes an executor.
    ExecutorRegister "executor_register" POST ["/api/codex-exec/register"] Message;
    /// A service deletes an executor.
    ExecutorDelete "executor_delete" DELETE ["/api/codex-exec/executors/{id}"] Message;
    /// A service binds an executor.
    ExecutorBind "executor_bind" POST ["/api/codex-exec/workspaces/{wid}/executors"] Message;
    /// A service lists the executors of a workspace.
    ExecutorsBound "executors_bound" GET ["/api/codex-exec/workspaces/{wid}/executors"] Message;
    /// A service unbinds an executor.
    ExecutorUnbind "executor_unbind" DELETE ["/api/codex-exec/workspaces/{wid}/executors/{id}"] Message;
    /// A message of an MCP client.
    Mcp "mcp" POST ["/mcp" "/v1/mcp"] Rpc "mcp";
    /// An MCP client asks how to come by a token.
    ProtectedResource "protected_resource" GET [
        "/.well-known/oauth-protected-resource"
        "/.well-known/oauth-protected-resource/mcp"
        "/.well-known/oauth-protected-resource/v1/mcp"
        // Where the original has it.
        "/v1/.well-known/oauth-protected-resource"
    ] Json;
    /// A service, or a caller for its own workspace, makes a transfer.
    TransferCreate "transfer_create" POST ["/api/exec-gateway/relay/create"] Message;
    /// The sending side of a transfer.
    TransferPut "transfer_put" PUT ["/relay/{ticket}"] Message;
    /// The receiving side of a transfer.
    TransferGet "transfer_get" GET ["/relay/{ticket}"] Message;
    /// The gateway is alive.
    Health "health" GET HEAD ["/healthz"] Text;
    /// This description.
    OpenApi "openapi" GET HEAD ["/openapi.json"] Json;
}

impl Route {
    /// What is no route, in metrics.
    pub const NONE: &str = "none";

    /// What the table says of it.
    pub fn row(self) -> &'static Row {
        // Both are made of the same list.
        &TABLE[self as usize]
    }
}

/// Why a request has no route.
#[derive(Debug, PartialEq, Eq)]
pub enum RouteError {
    /// No such path.
    NotFound,
    /// A path of this route, but what stands for its parameter is not UTF-8 in percent-encoding.
    Parameter(Route),
    /// The path exists for other methods, which this lists.
    Method(String),
}

/// The table of contents of the API.
pub struct Router(matchit::Router<Vec<(Method, Route)>>);

impl Router {
    /// Every endpoint.
    pub fn new() -> Self {
        let mut table: BTreeMap<&str, Vec<(Method, Route)>> = BTreeMap::new();
        for row in TABLE {
            for path in row.paths {
                let methods = row.methods.iter().map(|method| (method.clone(), row.route));
                table.entry(path).or_default().extend(methods);
            }
        }
        let mut paths = matchit::Router::new();
        for (path, routes) in table {
            paths.insert(path, routes).expect("paths of the table do not conflict");
        }
        Self(paths)
    }

    /// The route of a request and the parameters of its path, percent-decoded and with `/` between them.
    ///
    /// # Errors
    /// [`RouteError`].
    pub fn find(&self, method: &Method, path: &str) -> Result<(Route, String), RouteError> {
        let Match { value: routes, params } = self.0.at(path).map_err(|_| RouteError::NotFound)?;
        let Some((_, route)) = routes.iter().find(|(answered, _)| answered == method) else {
            let allowed: Vec<&str> = routes.iter().map(|(answered, _)| answered.as_str()).collect();
            return Err(RouteError::Method(allowed.join(", ")));
        };
        Ok((*route, parameter(&params).ok_or(RouteError::Parameter(*route))?))
    }
}

impl Default for Router {
    fn default() -> Self {
        Self::new()
    }
}

fn parameter(params: &Params<'_, '_>) -> Option<String> {
    let decoded: Option<Vec<String>> = params.iter().map(|(_, value)| percent_decode(value)).collect();
    Some(decoded?.join("/"))
}

/// Decodes `%XX`; `None` where it is malformed or not UTF-8.
pub fn percent_decode(text: &str) -> Option<String> {
    if !text.contains('%') {
        return Some(text.to_owned());
    }
    let mut decoded = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        if byte == b'%' {
            let high = char::from(bytes.next()?).to_digit(16)?;
            let low = char::from(bytes.next()?).to_digit(16)?;
            decoded.push(u8::try_from(high * 16 + low).ok()?);
        } else {
            decoded.push(byte);
        }
    }
    String::from_utf8(decoded).ok()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_older_clients_paths_lead_to_the_same_doors() {
        let router = Router::new();
        for base in ["/api/connectors", "/api/sdk"] {
            let found = router.find(&Method::POST, &format!("{base}/envs/my-mac/tool/call"));
            assert_eq!(found, Ok((Route::ToolCall, "my-mac".into())));
        }
    }

    #[test]
    fn a_wrong_method_is_told_the_right_one() {
        assert_eq!(
            Router::new().find(&Method::GET, "/api/connectors/envs/list"),
            Err(RouteError::Method("POST".into()))
        );
        assert_eq!(Router::new().find(&Method::GET, "/nowhere"), Err(RouteError::NotFound));
    }

    #[test]
    fn a_parameter_that_is_no_text_is_told_apart_from_a_path_that_is_not_there() {
        let found = Router::new().find(&Method::GET, "/bridge/%ff");
        assert_eq!(found, Err(RouteError::Parameter(Route::Bridge)));
    }

    #[test]
    fn every_route_has_its_own_row_and_name() {
        assert!(TABLE.iter().all(|row| std::ptr::eq(row.route.row(), row)));
        let names: std::collections::BTreeSet<_> = Route::NAMES.iter().collect();
        assert_eq!(names.len(), 1 + TABLE.len());
        assert_eq!([Route::EnvList, Route::Mcp].map(|route| route.row().name), ["env_list", "mcp"]);
    }

    #[test]
    fn names_are_percent_decoded_and_torn_escapes_refused() {
        assert_eq!(percent_decode("a%2Fb").as_deref(), Some("a/b"));
        assert_eq!(percent_decode("a%2"), None);
        assert_eq!(percent_decode("%ff"), None);
    }
}
