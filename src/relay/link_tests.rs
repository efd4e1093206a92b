//! Streams on a link against a model: whatever is opened, said, reset, withdrawn and left, in whatever order, each
//! stream gets its own frames and its own end, the executor hears of each what it should, and no route is left.

#![allow(clippy::unwrap_used)]

use std::collections::HashMap;

use proptest::prelude::*;
use tokio::io::{DuplexStream, duplex};
use tokio_tungstenite::tungstenite::protocol::Role;

use super::tests::link_with;
use super::*;
use crate::protocol::frame::Data;

const STREAMS_MAX: usize = 5;
const WORKSPACE_STREAMS_MAX: usize = 2;

#[derive(Debug, Clone)]
enum Step {
    /// Somebody of a workspace asks for a stream under this id.
    Open { id: u8, workspace: u8 },
    /// The executor says something on it.
    Hear(u8),
    /// The gateway's end says something on it.
    Say(u8),
    /// The executor ends it.
    Reset(u8),
    /// The gateway's end leaves, after it has read what there is or without.
    Leave { id: u8, reads: bool },
    /// A workspace loses its right.
    Withdraw(u8),
}

#[derive(Debug, Clone, Copy)]
enum Cut {
    Vanish,
    Close,
    Drain,
}

fn step() -> impl Strategy<Value = Step> {
    let (id, workspace) = (0..5u8, 0..3u8);
    prop_oneof![
        4 => (id.clone(), workspace.clone()).prop_map(|(id, workspace)| Step::Open { id, workspace }),
        6 => id.clone().prop_map(Step::Hear),
        4 => id.clone().prop_map(Step::Say),
        1 => id.clone().prop_map(Step::Reset),
        2 => (id, any::<bool>()).prop_map(|(id, reads)| Step::Leave { id, reads }),
        1 => workspace.prop_map(Step::Withdraw),
    ]
}

fn cut() -> impl Strategy<Value = Cut> {
    prop_oneof![Just(Cut::Vanish), Just(Cut::Close), Just(Cut::Drain)]
}

/// The gateway's end of a stream, and what the model knows about it.
struct Held {
    handle: StreamHandle,
    workspace: u8,
    expected: Vec<Body>,
    end: Option<StreamEnd>,
}

impl Held {
    /// Reads what has arrived, and its end if there is one.
    async fn reads(&mut self) {
        for body in self.expected.drain(..) {
            assert_eq!(soon(self.handle.receive()).await, Ok(body));
        }
        if let Some(end) = self.end {
            // And at every later time.
            for _ in 0..2 {
                assert_eq!(soon(self.handle.receive()).await, Err(end));
            }
        }
    }
}

async fn soon<T>(future: impl Future<Output = T>) -> T {
    timeout(Duration::from_secs(60), future).await.expect("it comes")
}

fn stream_id(id: u8) -> StreamId {
    StreamId::new(&format!("s{id}")).unwrap()
}

fn workspace_id(workspace: u8) -> WorkspaceId {
    WorkspaceId::new(&format!("w{workspace}")).unwrap()
}

fn data(number: u32) -> Body {
    let payload = Bytes::copy_from_slice(&number.to_be_bytes());
    Body::Data(Data { seq: number, segment_index: 0, segment_count: 1, payload })
}

fn reset(reason: &str) -> Body {
    Body::Reset { reason: reason.into() }
}

struct Model {
    link: LinkHandle,
    peer: WebSocketStream<DuplexStream>,
    /// A stream that is always there: what has passed on it was behind all that was sent before.
    fence: StreamHandle,
    holders: HashMap<u8, Held>,
    /// What the executor should hear, by stream.
    told: HashMap<StreamId, Vec<Body>>,
    number: u32,
}

impl Model {
    fn number(&mut self) -> u32 {
        self.number += 1;
        self.number
    }

    /// The holder of an id, if the link still knows the stream.
    fn live(&mut self, id: u8) -> Option<&mut Held> {
        self.holders.get_mut(&id).filter(|held| held.end.is_none())
    }

    fn count(&self, workspace: Option<u8>) -> usize {
        let counts = |held: &&Held| held.end.is_none() && workspace.is_none_or(|one| held.workspace == one);
        self.holders.values().filter(counts).count()
    }

    async fn send(&mut self, stream_id: StreamId, body: Body) {
        self.peer.send(Message::Binary(Frame { stream_id, body }.encode())).await.unwrap();
    }

    /// Returns when the link has read all that the executor sent.
    async fn settle(&mut self) {
        self.send(self.fence.id().clone(), Body::Heartbeat).await;
        assert_eq!(soon(self.fence.receive()).await, Ok(Body::Heartbeat));
    }

    async fn take(&mut self, step: Step) {
        match step {
            Step::Open { id, workspace } => {
                self.settle().await;
                let expected = if self.live(id).is_some() {
                    Some(OpenError::Taken)
                } else if self.count(None) + 1 == STREAMS_MAX || self.count(Some(workspace)) == WORKSPACE_STREAMS_MAX {
                    Some(OpenError::TooManyStreams)
                } else {
                    None
                };
                let opened = self.link.open_stream_as(stream_id(id), &workspace_id(workspace));
                assert_eq!(opened.as_ref().err(), expected.as_ref());
                if let Ok(handle) = opened {
                    let held = Held { handle, workspace, expected: Vec::new(), end: None };
                    // Who held the id before leaves late, with or without having noticed its end: nobody's loss.
                    drop(self.holders.insert(id, held));
                }
            }
            Step::Hear(id) => {
                let body = data(self.number());
                self.send(stream_id(id), body.clone()).await;
                if let Some(held) = self.live(id) {
                    held.expected.push(body);
                }
            }
            Step::Say(id) => {
                self.settle().await;
                let body = data(self.number());
                let Some(held) = self.live(id) else { return };
                held.handle.send(Frame { stream_id: stream_id(id), body: body.clone() }.encode()).await.unwrap();
                self.told.entry(stream_id(id)).or_default().push(body);
            }
            Step::Reset(id) => {
                self.send(stream_id(id), reset("enough")).await;
                if let Some(held) = self.live(id) {
                    held.end = Some(StreamEnd::Reset);
                }
                self.settle().await;
            }
            Step::Leave { id, reads } => {
                self.settle().await;
                let Some(mut held) = self.holders.remove(&id) else { return };
                if reads {
                    held.reads().await;
                }
                if held.end.is_none() {
                    self.told.entry(stream_id(id)).or_default().push(reset("closed"));
                }
            }
            Step::Withdraw(workspace) => {
                self.settle().await;
                self.link.end_workspace(&workspace_id(workspace));
                let told = &mut self.told;
                for (id, held) in &mut self.holders {
                    if held.workspace == workspace && held.end.is_none() {
                        held.end = Some(StreamEnd::Withdrawn);
                        told.entry(stream_id(*id)).or_default().push(reset("withdrawn"));
                    }
                }
                for held in self.holders.values().filter(|held| held.end == Some(StreamEnd::Withdrawn)) {
                    assert_eq!(held.handle.send(Bytes::new()).await, Err(StreamEnd::Withdrawn));
                }
            }
        }
        assert_eq!(self.link.streams(), self.count(None) + 1);
    }

    /// All that the executor has heard on each stream until now.
    async fn heard(&mut self) -> HashMap<StreamId, Vec<Body>> {
        let fence = self.fence.id().clone();
        self.fence.send(Frame { stream_id: fence.clone(), body: Body::Heartbeat }.encode()).await.unwrap();
        let mut heard: HashMap<StreamId, Vec<Body>> = HashMap::new();
        loop {
            let Some(Ok(Message::Binary(wire))) = soon(self.peer.next()).await else { panic!("a frame") };
            let frame = Frame::decode(wire).unwrap();
            if frame.stream_id == fence {
                return heard;
            }
            heard.entry(frame.stream_id.detached()).or_default().push(frame.body);
        }
    }
}

async fn play(steps: Vec<Step>, cut: Cut) {
    let (link, outbox) = link_with(config::Link {
        streams_max: STREAMS_MAX,
        workspace_streams_max: WORKSPACE_STREAMS_MAX,
        ..config::Link::default()
    });
    let (ours, theirs) = duplex(1 << 20);
    let socket = WebSocketStream::from_raw_socket(ours, Role::Server, None).await;
    let running = tokio::spawn(run(socket, link.clone(), outbox));
    let peer = WebSocketStream::from_raw_socket(theirs, Role::Client, None).await;
    let fence = link.open_stream(&WorkspaceId::new("fence").unwrap()).unwrap();
    let mut model = Model { link, peer, fence, holders: HashMap::new(), told: HashMap::new(), number: 0 };
    for step in steps {
        model.take(step).await;
    }
    assert_eq!(model.heard().await, model.told);

    match cut {
        Cut::Vanish => {}
        Cut::Close => model.peer.close(None).await.unwrap(),
        Cut::Drain => {
            model.settle().await;
            model.link.close(CloseReason::Draining);
        }
    }
    let Model { link, mut peer, mut fence, mut holders, .. } = model;
    if let Cut::Drain = cut {
        assert!(
            matches!(soon(peer.next()).await, Some(Ok(Message::Close(Some(frame)))) if frame.code == CloseCode::Restart)
        );
    }
    drop(peer);
    let expected = if let Cut::Drain = cut { LinkEnd::Closed(CloseReason::Draining) } else { LinkEnd::Peer };
    assert_eq!(soon(running).await.unwrap(), expected);
    for held in holders.values_mut() {
        held.end.get_or_insert(StreamEnd::Disconnected);
        held.reads().await;
    }
    assert_eq!(soon(fence.receive()).await, Err(StreamEnd::Disconnected));
    assert_eq!(link.open_stream(&workspace_id(0)).unwrap_err(), OpenError::Disconnected);
    drop((holders, fence));
    let routes = link.routes();
    assert!(routes.streams.is_empty() && routes.per_workspace.is_empty());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn every_stream_gets_its_own_frames_and_its_own_end(steps in prop::collection::vec(step(), 1..48), cut in cut()) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        runtime.block_on(play(steps, cut));
    }
}
