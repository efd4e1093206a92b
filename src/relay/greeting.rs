//! The first words on a socket whose streams will share one JSON-RPC session.
//!
//! Owned by the task that is about to run the link. It initializes the executor's session, or resumes that of the
//! socket before; it starts nothing and knows no stream.

use std::time::Duration;

use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use serde_json::value::RawValue;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::{Instant, timeout};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;

use super::client::{CLIENT_NAME, Detaching};
use super::shared::{Limits, Shared};
use crate::config;
use crate::protocol::rpc::{
    EnvironmentInfoRead, ExecutorSessionId, INITIALIZED, Incoming, Initialize, Method, RequestId, RpcError,
    encode_notification, encode_request,
};

/// What the executor told when its session was initialized.
struct Greeting {
    session: Option<ExecutorSessionId>,
    environment: Option<Box<RawValue>>,
    resumed: bool,
}

/// Why a shared socket was not taken into use.
#[derive(Debug, thiserror::Error)]
pub enum GreetError {
    /// The socket ended.
    #[error("the socket ended")]
    Ended,
    /// The executor refused to initialize.
    #[error("the executor refused to initialize: {0}")]
    Refused(RpcError),
    /// The executor answered with something else.
    #[error("the executor's answer is malformed")]
    Malformed,
    /// The executor did not answer in time.
    #[error("the executor did not initialize in time")]
    Timeout,
}

/// What a socket follows.
pub enum Former {
    /// Nothing.
    None,
    /// A socket of this gateway process.
    Socket(Box<Shared>),
    /// A socket of an earlier gateway process, with the processes on it, by their names at the executor.
    Stored(ExecutorSessionId, Vec<String>),
}

impl Former {
    /// The executor's session on it.
    pub fn session(&self) -> Option<&ExecutorSessionId> {
        match self {
            Self::None => None,
            Self::Socket(shared) => shared.session(),
            Self::Stored(session, _) => Some(session),
        }
    }
}

/// Initializes the one session of a socket that its streams will share: the one of the former socket, if the executor
/// still has it.
///
/// # Errors
/// [`GreetError`], with what the next socket may follow. Cancelling loses it.
pub async fn greet<S>(
    socket: &mut WebSocketStream<S>,
    settings: &config::Link,
    former: Former,
) -> Result<Box<Shared>, (GreetError, Former)>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let wait = Duration::from_secs(settings.handshake_timeout_secs);
    let greeted = timeout(wait, initialize(socket, former.session())).await.unwrap_or(Err(GreetError::Timeout));
    let greeting = match greeted {
        Ok(greeting) => greeting,
        Err(error) => return Err((error, former)),
    };
    let limits = Limits {
        in_flight_max: settings.requests_in_flight_max,
        sessions_max: settings.sessions_max,
        message_bytes_max: settings.message_bytes_max,
        frame_bytes_max: settings.frame_bytes_max,
    };
    let new = |adopts| Box::new(Shared::new(limits, greeting.session, greeting.environment, adopts));
    Ok(match former {
        Former::Socket(shared) if greeting.resumed => shared,
        Former::Stored(_, processes) if greeting.resumed => {
            let mut shared = new(Some(Instant::now() + Duration::from_secs(settings.adopt_secs)));
            shared.adopt(&processes);
            shared
        }
        _ => new(None),
    })
}

async fn initialize<S>(
    socket: &mut WebSocketStream<S>,
    former: Option<&ExecutorSessionId>,
) -> Result<Greeting, GreetError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let detaching = Detaching::begin();
    let mut greeting = loop {
        match ask(socket, former.cloned()).await {
            Err(GreetError::Refused(error)) if former.is_some() && error.is_attached() => {
                if !detaching.again().await {
                    return Err(GreetError::Refused(error));
                }
            }
            // It is another process, or it is too late.
            Err(GreetError::Refused(_)) if former.is_some() => break ask(socket, None).await?,
            greeted => break greeted?,
        }
    };
    send(socket, encode_notification(INITIALIZED, &serde_json::json!({}))).await?;
    if greeting.environment.is_none() {
        // Older executors tell it apart, or not at all.
        greeting.environment = match call(socket, EnvironmentInfoRead::NAME, &EnvironmentInfoRead {}).await {
            Ok(environment) => Some(environment),
            Err(GreetError::Refused(_)) => None,
            Err(error) => return Err(error),
        };
    }
    Ok(greeting)
}

async fn ask<S>(
    socket: &mut WebSocketStream<S>,
    resume_session_id: Option<ExecutorSessionId>,
) -> Result<Greeting, GreetError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    #[derive(serde::Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Initialized {
        #[serde(default)]
        session_id: Option<ExecutorSessionId>,
        #[serde(default)]
        environment_info: Option<Box<RawValue>>,
    }
    let resumed = resume_session_id.is_some();
    let initialize = Initialize { client_name: CLIENT_NAME.into(), resume_session_id };
    let answer = call(socket, Initialize::NAME, &initialize).await?;
    let told: Initialized = serde_json::from_str(answer.get()).map_err(|_| GreetError::Malformed)?;
    Ok(Greeting { session: told.session_id, environment: told.environment_info, resumed })
}

/// One request on a socket that nothing else happens on, but news of processes from before.
async fn call<S>(
    socket: &mut WebSocketStream<S>,
    method: &str,
    params: &impl serde::Serialize,
) -> Result<Box<RawValue>, GreetError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    send(socket, encode_request(0, method, params, None)).await?;
    while let Some(message) = socket.next().await {
        let json: Bytes = match message.map_err(|_| GreetError::Ended)? {
            Message::Text(text) => text.into(),
            Message::Binary(bytes) => bytes,
            Message::Close(_) => return Err(GreetError::Ended),
            _ => continue,
        };
        match Incoming::parse(&json) {
            Ok(Incoming::Response { id: RequestId::Number(0), result }) => return Ok(result.to_owned()),
            Ok(Incoming::Error { id: RequestId::Number(0 | -1), error }) => return Err(GreetError::Refused(error)),
            // Output that nobody is there to take yet is read from the executor's ring by who resumes.
            Ok(_) => {}
            Err(_) => return Err(GreetError::Malformed),
        }
    }
    Err(GreetError::Ended)
}

async fn send<S>(socket: &mut WebSocketStream<S>, json: Vec<u8>) -> Result<(), GreetError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let text = String::from_utf8(json).expect("our own JSON is text");
    socket.send(Message::text(text)).await.map_err(|_| GreetError::Ended)
}
