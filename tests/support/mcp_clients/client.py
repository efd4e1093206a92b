"""The official Python client: lists the tools and calls some, with all that it checks. Prints what came as one JSON."""

import asyncio
import json
import sys

from mcp import Client, ClientSession
from mcp.client.streamable_http import create_mcp_http_client, streamable_http_client


async def of_session(http, url, marker):
    """The older way: an introduction first."""
    told = []

    async def progress(done, total, message):
        told.append(done)

    async with streamable_http_client(url, http_client=http) as streams, ClientSession(*streams[:2]) as session:
        await session.initialize()
        tools = await session.list_tools()
        shell = await session.call_tool("shell", {"command": "sleep 2; echo here"}, progress_callback=progress)
        missing = await session.call_tool("read_file", {"path": "nowhere"})
        wrong = await session.call_tool("shell", {"command": 5})
        late = await given_up(session.call_tool("shell", {"command": f"exec sleep {marker}"}))
        again = await session.call_tool("list_environments", {})
    return {
        "tools": [tool.name for tool in tools.tools],
        "stdout": shell.structured_content["stdout"],
        "progress": told,
        "missing": [missing.is_error, missing.structured_content["code"]],
        "wrong": [wrong.is_error, wrong.structured_content["code"]],
        "given_up": late,
        "environments": [environment["name"] for environment in again.structured_content["environments"]],
    }


async def given_up(call):
    """Whether a call was given up by its caller, as people do."""
    try:
        async with asyncio.timeout(2):
            await call
    except TimeoutError:
        return True
    return False


async def of_client(http, url):
    """The newer way: whatever the two agree on."""
    async with Client(streamable_http_client(url, http_client=http)) as client:
        tools = await client.list_tools()
        shell = await client.call_tool("shell", {"command": ["echo", "newer"]})
    return {"tools": [tool.name for tool in tools.tools], "stdout": shell.structured_content["stdout"]}


async def main(url, token, marker):
    headers = {"Authorization": f"Bearer {token}"}
    async with create_mcp_http_client(headers=headers) as http:
        session = await of_session(http, url, marker)
    async with create_mcp_http_client(headers=headers) as http:
        client = await of_client(http, url)
    print(json.dumps({"session": session, "client": client}))


asyncio.run(main(*sys.argv[1:]))
