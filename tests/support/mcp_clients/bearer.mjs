// Stands before the gateway for the conformance suite, which cannot be given a token and calls the tools of a server that
// is made for it: adds the bearer, and puts tools of ours in the place of those that say how any tool behaves. Prints the
// URL it listens at.
import http from "node:http";

const [address, token] = process.argv.slice(2);
const [host, port] = address.split(":");

const ours = {
  test_simple_text: { name: "list_environments", arguments: {} },
  test_error_handling: { name: "read_file", arguments: { path: "nowhere" } },
  test_tool_with_progress: { name: "shell", arguments: { command: "sleep 3.5; echo done" } },
};

function rewritten(body) {
  try {
    const message = JSON.parse(body);
    Object.assign(message.params, ours[message.method === "tools/call" && message.params.name]);
    return JSON.stringify(message);
  } catch {
    return body;
  }
}

const server = http.createServer(async (request, response) => {
  const { method, url: path } = request;
  const body = rewritten(Buffer.concat(await request.toArray()).toString());
  // Host and Origin pass as they are, since the suite tests what becomes of them.
  const headers = { ...request.headers, authorization: `Bearer ${token}`, "content-length": Buffer.byteLength(body) };
  delete headers["transfer-encoding"];
  const onward = http.request({ host, port, method, path, headers }, (answer) => {
    response.writeHead(answer.statusCode, answer.headers);
    answer.pipe(response);
  });
  onward.on("error", () => response.destroy());
  response.on("close", () => onward.destroy());
  onward.end(body);
});
server.listen(0, "127.0.0.1", () => console.log(`http://localhost:${server.address().port}/mcp`));
