// What llama.cpp makes of a GGUF file, by node-llama-cpp (npm i node-llama-cpp), whose folder
// MILKTEA_LLAMA_CPP names:
//
//     node tests/llama_cpp_oracle.mjs FOLDER ASKED FOUND
//
// ASKED is JSON {model, texts, prompts, tokens, jinja, conversations}; FOUND gets {ids, answers,
// rendered}: each text's ids, each prompt's greedy tokens, each conversation by llama.cpp's Jinja.
import {readFileSync, writeFileSync} from "node:fs";
import {join} from "node:path";
import {pathToFileURL} from "node:url";

const [folder, asked, found] = process.argv.slice(2);
const index = join(folder, "node_modules/node-llama-cpp/dist/index.js");
const {getLlama} = await import(pathToFileURL(index));
const {model: modelPath, texts, prompts, tokens, jinja, conversations} =
    JSON.parse(readFileSync(asked, "utf8"));
const llama = await getLlama({
    gpu: false, build: "never", skipDownload: true, maxThreads: 1, logLevel: "error"
});
const model = await llama.loadModel({modelPath});
const ids = texts.map((text) => model.tokenize(text, true));
const context = await model.createContext({contextSize: 512, threads: 1});
const sequence = context.getSequence();
const answers = [];
for (const prompt of prompts) {
    await sequence.clearHistory();
    const answer = [];
    for await (const id of sequence.evaluate(prompt, {temperature: 0, yieldEogToken: true})) {
        answer.push(id);
        if (answer.length >= tokens || model.isEogToken(id))
            break;
    }
    answers.push(answer);
}
const renderer = new llama._bindings.AddonJinjaRenderer(jinja);
const rendered = conversations.map((messages) => renderer.render({
    messages, add_generation_prompt: true, bos_token: "<s>", eos_token: "</s>"
}));
writeFileSync(found, JSON.stringify({ids, answers, rendered}));
process.exit(0);
