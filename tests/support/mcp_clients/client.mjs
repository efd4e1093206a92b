// The official TypeScript client, which checks every answer against the schema of its tool, failures too.
import { Client } from "@modelcontextprotocol/sdk/client/index.js";
import { StreamableHTTPClientTransport } from "@modelcontextprotocol/sdk/client/streamableHttp.js";

const [url, token] = process.argv.slice(2);
const headers = { Authorization: `Bearer ${token}` };
const client = new Client({ name: "test", version: "1" });
await client.connect(new StreamableHTTPClientTransport(new URL(url), { requestInit: { headers } }));
// From now on it knows the schemas.
const { tools } = await client.listTools();
const call = async (name, args) => (await client.callTool({ name, arguments: args })).structuredContent;
const shell = await call("shell", { command: "echo checked" });
const late = await call("shell", { command: "sleep 9", timeout_ms: 500 });
const missing = await call("read_file", { path: "nowhere" });
const wrong = await call("terminate", { session_id: "nowhere" });
await call("list_processes", {});
await call("list_environments", {});
const { session_id } = await call("exec_command", { command: "echo said" });
const said = await call("read_output", { session_id, yield_time_ms: 25000, chunks: true });
const codes = [missing.code, wrong.code];
console.log(JSON.stringify({ tools: tools.length, stdout: shell.stdout, late: late.timed_out, codes, said: said.text }));
await client.close();
