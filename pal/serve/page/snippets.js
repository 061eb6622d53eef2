// The current request as a curl command and as a Python program.

const shell = (text) => `'${text.replaceAll("'", "'\\''")}'`;
const quoted = (value) => JSON.stringify(value); // JSON's strings are Python's, too

/** `handle` is null before the sound was indexed: then the program reads the file. */
export function curlOf({ origin, model, question, most, handle, fileName, format, key }) {
  const audio = handle === null ? { data: "@", format } : { id: handle };
  let text = [
    `{"model": ${quoted(model)}, "max_tokens": ${most}, "stream": true, "messages": [{"role": "user", "content": [`,
    `  {"type": "input_audio", "input_audio": ${quoted(audio)}},`,
    `  {"type": "text", "text": ${quoted(question)}}]}]}`,
  ].join("\n");
  let end = "'END'";
  if (handle === null) {
    // the shell puts the file's base64 in, and would act on these characters
    text = text.replace(/[\\$`]/g, "\\$&").replace('"data":"@"', () => `"data":"$(base64 < ${shell(fileName)} | tr -d '\\n')"`);
    end = "END";
  }
  const lines = [`curl -N ${origin}/v1/chat/completions -H 'Content-Type: application/json' \\`];
  if (key) lines.push('  -H "Authorization: Bearer $PAL_API_KEY" \\');
  lines.push(`  -d @- <<${end}`, text, "END");
  return lines.join("\n");
}

export function pythonOf({ origin, model, question, most, handle, fileName, format, key }) {
  const imports = [];
  if (handle === null) imports.push("import base64");
  if (key) imports.push("import os");
  if (imports.length) imports.push("");
  const audio =
    handle === null
      ? [
          `with open(${quoted(fileName)}, "rb") as file:`,
          "    data = base64.b64encode(file.read()).decode()",
          `audio = {"type": "input_audio", "input_audio": {"data": data, "format": ${quoted(format)}}}`,
        ]
      : [`audio = {"type": "input_audio", "input_audio": {"id": ${quoted(handle)}}}`];
  return [
    ...imports,
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url="${origin}/v1", api_key=${key ? 'os.environ["PAL_API_KEY"]' : '"none"'})`,
    ...audio,
    `question = {"type": "text", "text": ${quoted(question)}}`,
    "chunks = client.chat.completions.create(",
    `    model=${quoted(model)},`,
    '    messages=[{"role": "user", "content": [audio, question]}],',
    `    max_tokens=${most},`,
    "    stream=True,",
    ")",
    "for chunk in chunks:",
    '    print(chunk.choices[0].delta.content or "", end="", flush=True)',
    "print()",
  ].join("\n");
}
