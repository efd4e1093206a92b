//! Transfers: `PUT` and `GET` on one ticket, and how services get one (connectors-api.md §2.6, faults 26 and 55).

use exec_gateway::admin::Request;
use exec_gateway::config::{Config, Secret};
use http_body_util::BodyExt;
use hyper::Response;
use hyper::body::Incoming;
use serde_json::{Value, json};
use tokio_util::task::AbortOnDropHandle;

use crate::support::caller::Failure;
use crate::support::gateway::workspace;
use crate::support::{Answer, Caller, DaemonProcess, MIB, Pieces, Scratch, TestGateway, eventually, noise, peak_mib};

const SECRET: &str = "between-the-services";

/// A gateway with two executors of workspace `w` and the service that makes transfers.
struct Depot {
    gateway: TestGateway,
    service: Caller,
    from: String,
    to: String,
}

impl Depot {
    async fn start() -> Self {
        Self::with(|_| {}).await
    }

    async fn with(change: impl FnOnce(&mut Config)) -> Self {
        let gateway = TestGateway::with(|config| {
            config.auth.shared_secret = Some(Secret::new(SECRET.into()));
            change(config);
        })
        .await;
        let service = Caller::new(gateway.address(), Some(SECRET.into()));
        let (from, to) = (gateway.executor("w", "from").await.executor, gateway.executor("w", "to").await.executor);
        Self { gateway, service, from, to }
    }

    fn order(&self) -> Value {
        json!({ "workspace_id": "w", "source_exe_id": self.from, "dest_exe_id": self.to })
    }

    async fn create(&self, order: &Value) -> Answer {
        self.service.post("/api/exec-gateway/relay/create", order.clone()).await
    }

    async fn ticket(&self) -> String {
        self.ticket_of(json!({})).await
    }

    /// A ticket of a changed order.
    async fn ticket_of(&self, change: Value) -> String {
        let mut order = self.order();
        order.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
        let answer = self.create(&order).await;
        assert_eq!(answer.status, 201, "{answer:?}");
        answer.json()["ticket"].as_str().unwrap().to_owned()
    }

    /// One side of a transfer, with its ticket as the credential.
    async fn side(&self, method: &str, ticket: &str, length: Option<u64>) -> Pieces {
        let bearer = format!("Bearer {ticket}");
        let headers = [("authorization", bearer.as_str())];
        Pieces::send(self.gateway.address(), method, &format!("/relay/{ticket}"), &headers, length).await
    }

    async fn put(&self, ticket: &str, bytes: Option<usize>) -> Pieces {
        self.side("PUT", ticket, bytes.map(|bytes| bytes as u64)).await
    }

    async fn get(&self, ticket: &str) -> Pieces {
        self.side("GET", ticket, Some(0)).await
    }

    /// What becomes of the same ticket once those who had it have left.
    async fn second_try(&self, ticket: &str) -> (u16, (Vec<u8>, bool)) {
        eventually("both sides are free", async || {
            let (put, mut get) = (self.put(ticket, None).await, self.get(ticket).await);
            // One that has left may not be missed yet.
            let received = tokio::spawn(async move { Some(drained(get.begun().await.ok()?).await) });
            let received = AbortOnDropHandle::new(received);
            let sent = pour(put, b"second").await.ok()?;
            if sent.status == 200 { Some((200, received.await.unwrap()?)) } else { None }
        })
        .await
    }

    /// The one of two on the same side that waits for the other side; the second to come is refused.
    async fn waiting(&self, method: &str, ticket: &str) -> Pieces {
        let length = (method == "GET").then_some(0);
        let (mut one, mut other) = (self.side(method, ticket, length).await, self.side(method, ticket, length).await);
        let (refused, waiting) = tokio::select! {
            refused = one.begun() => (refused, other),
            refused = other.begun() => (refused, one),
        };
        let refused = Answer::whole(refused.unwrap()).await.unwrap();
        assert_eq!(refusal(&refused), (423, format!("{method} side already claimed")));
        waiting
    }
}

/// The text of an error in the envelope of these doors.
#[track_caller]
fn refusal(answer: &Answer) -> (u16, String) {
    (answer.status.as_u16(), answer.json()["error"].as_str().unwrap_or_else(|| panic!("{answer:?}")).to_owned())
}

/// A body to its end, clean or not.
async fn drained(answer: Response<Incoming>) -> (Vec<u8>, bool) {
    let (mut body, mut bytes) = (answer.into_body(), Vec::new());
    loop {
        match body.frame().await {
            None => return (bytes, true),
            Some(Err(_)) => return (bytes, false),
            Some(Ok(frame)) => bytes.extend_from_slice(&frame.into_data().unwrap_or_default()),
        }
    }
}

/// Sends all of it, in pieces.
async fn pour(put: Pieces, bytes: &[u8]) -> Result<Answer, Failure> {
    for piece in bytes.chunks(64 * 1024) {
        put.piece(piece.to_vec()).await?;
    }
    put.end().await;
    put.answer().await
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_pass_whole_whoever_comes_first_and_however_they_are_framed() {
    let depot = Depot::start().await;
    let bytes = noise(5, 9 * MIB + 5);
    for length in [None, Some(bytes.len())] {
        for put_first in [true, false] {
            let ticket = depot.ticket().await;
            let (put, mut get) = if put_first {
                let put = depot.put(&ticket, length).await;
                (put, depot.get(&ticket).await)
            } else {
                let get = depot.get(&ticket).await;
                (depot.put(&ticket, length).await, get)
            };
            let received = async {
                let answer = get.begun().await.unwrap();
                assert_eq!(answer.status(), 200);
                let told = answer.headers().get("content-length").map(|length| length.to_str().unwrap().to_owned());
                assert_eq!(told, length.map(|length| length.to_string()));
                assert_eq!(answer.headers()["content-type"], "application/octet-stream");
                assert_eq!(answer.headers()["x-content-type-options"], "nosniff");
                drained(answer).await
            };
            let (sent, (received, whole)) = tokio::join!(pour(put, &bytes), received);
            assert!(whole && received == bytes, "length {length:?}, sender first: {put_first}");
            let sent = sent.unwrap();
            assert_eq!((sent.status.as_u16(), sent.json()), (200, json!({ "bytes": bytes.len(), "status": "ok" })));

            for method in ["PUT", "GET"] {
                let late = depot.side(method, &ticket, Some(0)).await;
                assert_eq!(refusal(&late.answer().await.unwrap()), (410, "relay already finished".into()));
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_at_all_is_transferred_too() {
    let depot = Depot::start().await;
    for length in [None, Some(0)] {
        let ticket = depot.ticket().await;
        let (put, mut get) = (depot.put(&ticket, length).await, depot.get(&ticket).await);
        let (sent, received) = tokio::join!(pour(put, b""), async { drained(get.begun().await.unwrap()).await });
        assert_eq!((sent.unwrap().json(), received), (json!({ "bytes": 0, "status": "ok" }), (vec![], true)));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sender_that_fails_is_seen_as_a_failed_receipt() {
    let depot = Depot::start().await;
    for length in [None, Some(2000)] {
        let ticket = depot.ticket().await;
        let (put, mut get) = (depot.put(&ticket, length).await, depot.get(&ticket).await);
        put.piece(vec![1; 1000]).await.unwrap();
        let answer = get.begun().await.unwrap();
        drop(put);
        let (bytes, whole) = drained(answer).await;
        assert!(!whole, "{} bytes of {length:?} are no whole body", bytes.len());

        assert_eq!(depot.second_try(&ticket).await, (200, (b"second".to_vec(), true)));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_receiver_that_leaves_is_told_to_the_sender() {
    let depot = Depot::start().await;
    let ticket = depot.ticket().await;
    let (put, mut get) = (depot.put(&ticket, None).await, depot.get(&ticket).await);
    put.piece(vec![1; 1000]).await.unwrap();
    get.begun().await.unwrap();
    drop(get);
    // The gateway answers in the middle of the body, without being sent more of it.
    let answer = put.answer().await.unwrap();
    assert_eq!((refusal(&answer), answer.json()["bytes"].is_u64()), ((500, "the GET side left".into()), true));
}

#[tokio::test(flavor = "multi_thread")]
async fn never_more_bytes_pass_than_the_maker_allowed() {
    let depot = Depot::start().await;
    for (sent, whole) in [(1000, true), (1001, false), (100_000, false)] {
        let ticket = depot.ticket_of(json!({ "max_bytes": 1000 })).await;
        let (put, mut get) = (depot.put(&ticket, None).await, depot.get(&ticket).await);
        let bytes = vec![7; sent];
        let (answer, received) = tokio::join!(pour(put, &bytes), async { drained(get.begun().await.unwrap()).await });
        assert_eq!((received.0.len() <= 1000, received.1), (true, whole), "{sent} bytes");
        if let Ok(answer) = answer {
            assert_eq!((answer.status == 200, answer.json()["bytes"].as_u64()), (whole, Some(1000)), "{answer:?}");
        }
    }

    let ticket = depot.ticket_of(json!({ "max_bytes": 1000 })).await;
    let get = depot.waiting("GET", &ticket).await;
    let announced = depot.put(&ticket, Some(1001)).await.answer().await.unwrap();
    assert_eq!(refusal(&announced), (413, "more than 1000 bytes".into()));
    assert_eq!(refusal(&get.answer().await.unwrap()), (502, "the PUT side failed".into()));
}

#[tokio::test(flavor = "multi_thread")]
async fn who_waits_and_hangs_up_frees_the_side_at_once() {
    let depot = Depot::start().await;
    for (method, held) in [("PUT", 0), ("PUT", 1000), ("GET", 0)] {
        let ticket = depot.ticket().await;
        let former = depot.waiting(method, &ticket).await;
        if held > 0 {
            former.piece(vec![9; held]).await.unwrap();
        }
        drop(former);
        let second = depot.second_try(&ticket).await;
        assert_eq!(second, (200, (b"second".to_vec(), true)), "{method} with {held} bytes before");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sender_too_far_ahead_to_be_seen_hanging_up_gives_way_to_the_next() {
    let depot = Depot::start().await;
    let ticket = depot.ticket().await;
    let mut former = depot.put(&ticket, None).await;
    let newcomer = async {
        loop {
            let mut put = depot.put(&ticket, None).await;
            tokio::select! {
                refused = put.begun() => assert_eq!(refused.unwrap().status(), 423),
                // It may not get to read this, since it is in the middle of its body.
                _ = async { while former.piece(vec![9; 64 * 1024]).await.is_ok() {} } => return put,
            }
        }
    };
    let newcomer = newcomer.await;
    assert_ne!(former.begun().await.map_or(423, |answer| answer.status().as_u16()), 200);
    let mut get = depot.get(&ticket).await;
    let (sent, received) = tokio::join!(pour(newcomer, b"second"), async { drained(get.begun().await.unwrap()).await });
    assert_eq!((sent.unwrap().status.as_u16(), received), (200, (b"second".to_vec(), true)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_side_that_is_left_alone_is_told_when_the_ticket_ends() {
    let depot = Depot::with(|config| {
        config.transfer.ticket_ttl_secs = 1;
        config.transfer.ticket_ttl_max_secs = 1;
    })
    .await;
    // A maker that asks for an hour is given what the operator allows.
    let (one, other) = tokio::join!(depot.ticket_of(json!({ "ttl_seconds": 3600 })), depot.ticket());
    let (put, get) = (depot.put(&one, None).await, depot.get(&other).await);
    let (put, get) = tokio::join!(put.answer(), get.answer());
    assert_eq!(refusal(&put.unwrap()), (408, "timed out waiting for GET side".into()));
    assert_eq!(refusal(&get.unwrap()), (408, "timed out waiting for PUT side".into()));
    assert_eq!(refusal(&depot.get(&one).await.answer().await.unwrap()), (404, "no such transfer".into()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sender_that_sends_nothing_for_long_fails_the_transfer() {
    let depot = Depot::with(|config| config.transfer.stall_secs = 1).await;
    let ticket = depot.ticket().await;
    let (put, mut get) = (depot.put(&ticket, None).await, depot.get(&ticket).await);
    put.piece(b"some".to_vec()).await.unwrap();
    let (received, whole) = drained(get.begun().await.unwrap()).await;
    assert_eq!((received, whole), (b"some".to_vec(), false));
    assert_eq!(refusal(&put.answer().await.unwrap()), (500, "the PUT side sent nothing for 1 s".into()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_foreign_ticket_looks_like_an_unknown_one() {
    let depot = Depot::start().await;
    let ticket = depot.ticket().await;
    let (ours, theirs) = (depot.gateway.caller("w").await, depot.gateway.caller("other").await);
    let unknown = format!("rly_{}", "A".repeat(43));
    let told = |answer: Answer| (answer.status.as_u16(), answer.body);
    for method in ["PUT", "GET"] {
        let of =
            async |caller: &Caller, ticket: &str| told(caller.send(method, &format!("/relay/{ticket}"), &[], "").await);
        let foreign = of(&theirs, &ticket).await;
        assert_eq!(foreign.0, 404);
        assert_eq!(foreign, of(&theirs, &unknown).await);
        assert_eq!(foreign, told(depot.side(method, &unknown, Some(0)).await.answer().await.unwrap()));
        let stranger = of(&depot.gateway.stranger(), &ticket).await;
        assert_eq!(stranger.0, 401);
        assert_eq!(stranger, of(&Caller::new(depot.gateway.address(), Some(unknown.clone())), &ticket).await);
    }
    // The workspace's own credential is as good as the ticket.
    let path = format!("/relay/{ticket}");
    let (sent, received) = tokio::join!(ours.send("PUT", &path, &[], "bytes"), ours.send("GET", &path, &[], ""));
    assert_eq!((sent.status.as_u16(), &received.body[..]), (200, &b"bytes"[..]));
}

#[tokio::test(flavor = "multi_thread")]
async fn transfers_are_made_for_services_and_for_the_workspace_itself() {
    let depot = Depot::start().await;
    let elsewhere = depot.gateway.executor("other", "box").await.executor;
    let made = depot.create(&depot.order()).await.json();
    let (ticket, url) = (made["ticket"].as_str().unwrap(), made["upload_url"].as_str().unwrap());
    assert!(ticket.starts_with("rly_") && ticket.len() == 47, "{ticket}");
    assert_eq!((url, &made["download_url"]), (format!("{}/relay/{ticket}", depot.gateway.url()).as_str(), &json!(url)));
    assert!(made["expires_at"].as_str().is_some_and(|at| at.ends_with('Z')));

    let path = "/api/exec-gateway/relay/create";
    let ours = depot.gateway.caller("w").await.post(path, depot.order()).await;
    assert_eq!(ours.status, 201, "{ours:?}");
    let theirs = depot.gateway.caller("other").await.post(path, depot.order()).await;
    assert_eq!(refusal(&theirs), (403, format!("executor not in workspace: {}", depot.from)));
    for wrong in [Caller::new(depot.gateway.address(), Some("wrong".into())), depot.gateway.stranger()] {
        assert_eq!(refusal(&wrong.post(path, depot.order()).await), (401, "unauthorized".into()));
    }
    for foreign in [elsewhere.as_str(), "exe_00000000-0000-0000-0000-000000000000", "no id"] {
        let mut order = depot.order();
        order["dest_exe_id"] = json!(foreign);
        let refused = depot.create(&order).await;
        assert_eq!(refusal(&refused), (403, format!("executor not in workspace: {foreign}")));
    }
    for bad in [json!({}), json!([]), json!({ "workspace_id": "w", "source_exe_id": depot.from })] {
        assert_eq!(depot.create(&bad).await.status, 400, "{bad}");
    }
    let without = TestGateway::start().await;
    let answer = Caller::new(without.address(), Some(SECRET.into())).post(path, depot.order()).await;
    assert_eq!(refusal(&answer), (404, "no such path".into()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_workspace_has_so_many_transfers_and_takes_none_of_another() {
    let depot = Depot::with(|config| config.transfer.workspace_max = 2).await;
    let there = depot.gateway.executor("other", "box").await.executor;
    let first = depot.ticket().await;
    depot.ticket().await;
    assert_eq!(refusal(&depot.create(&depot.order()).await), (429, "the workspace has 2 transfers already".into()));
    let other = json!({ "workspace_id": "other", "source_exe_id": there, "dest_exe_id": there });
    assert_eq!(depot.create(&other).await.status, 201);

    for _ in 0..6 {
        // One that is over takes no place.
        let (put, get) = (depot.put(&first, None).await, depot.get(&first).await);
        drop(tokio::join!(pour(put, b"x"), get.answer()));
        if depot.create(&depot.order()).await.status == 201 {
            return;
        }
    }
    panic!("a transfer that is over takes a place");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transfer_ends_with_the_right_to_its_executors() {
    let depot = Depot::start().await;
    let (running, waited) = (depot.ticket().await, depot.ticket().await);
    let (put, mut get) = (depot.put(&running, None).await, depot.get(&running).await);
    put.piece(b"some".to_vec()).await.unwrap();
    let received = get.begun().await.unwrap();
    let waiting = depot.waiting("GET", &waited).await;

    let (executor, workspace) = (depot.to.parse().unwrap(), "w".parse().unwrap());
    depot.gateway.admin(Request::ExecutorUnbind { executor, workspace }).await;

    assert_eq!(drained(received).await, (b"some".to_vec(), false));
    assert_eq!(refusal(&put.answer().await.unwrap()), (500, "the transfer was withdrawn".into()));
    assert_eq!(refusal(&waiting.answer().await.unwrap()), (404, "no such transfer".into()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transfer_takes_little_memory_and_fails_for_both_sides_with_its_gateway() {
    let state = Scratch::new();
    let secret = state.path().join("secret");
    std::fs::write(&secret, SECRET).unwrap();
    let arguments = ["--auth-shared-secret-file", secret.to_str().unwrap()];
    let daemon = DaemonProcess::start(&state, "127.0.0.1:0".parse().unwrap(), &arguments).await;
    let (_, credentials) = workspace(&state, &daemon).await;
    let service = Caller::new(daemon.address, Some(SECRET.into()));
    let order = json!({
        "workspace_id": "w", "source_exe_id": credentials.executor, "dest_exe_id": credentials.executor,
    });
    let sides = async || {
        let made = service.post("/api/exec-gateway/relay/create", order.clone()).await.json();
        let ticket = made["ticket"].as_str().unwrap().to_owned();
        let bearer = format!("Bearer {ticket}");
        let side = async |method: &str, length| {
            let headers = [("authorization", bearer.as_str())];
            Pieces::send(daemon.address, method, &format!("/relay/{ticket}"), &headers, length).await
        };
        (side("PUT", None).await, side("GET", Some(0)).await)
    };

    let before = peak_mib(daemon.pid());
    let (put, mut get) = sides().await;
    let bytes = noise(8, MIB).repeat(256);
    let (sent, received) = tokio::join!(pour(put, &bytes), async { drained(get.begun().await.unwrap()).await });
    assert_eq!((sent.unwrap().status.as_u16(), received.0.len(), received.1), (200, bytes.len(), true));
    let peak = peak_mib(daemon.pid());
    println!("256 MiB transferred; most memory of the gateway before and after: {before} and {peak} MiB");
    assert!(peak < before + 32, "{before} and {peak} MiB");

    let (put, mut get) = sides().await;
    put.piece(b"some".to_vec()).await.unwrap();
    let received = get.begun().await.unwrap();
    daemon.kill().await;
    assert!(!drained(received).await.1, "a part is no whole");
    assert!(put.answer().await.is_err());
}
