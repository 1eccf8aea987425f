// Streams an answer with every denoising step, with Foundation alone (macOS 13 or newer).
//
//     swiftc -parse-as-library DiffusionClient.swift -o diffusion-client && ./diffusion-client "What is 17 + 25?"
//
// The server is found by the environment (MLX_DIFFUSIONGEMMA_URL, MLX_DIFFUSIONGEMMA_API_KEY) or at its default address.
// In an app: `for try await piece in DiffusionClient(url: url).stream(prompt: text) { ... }`.

import Foundation

/// What a stream gives: drafts that may still change, text that does not, and the end.
enum Piece {
    case frame(Frame)
    case text(String)
    case reasoning(String)
    case end(String)
}

/// The canvas after a denoising step. `tokens` and `settled` have one entry per position.
struct Frame {
    let block: Int
    let step: Int
    let total: Int
    let text: String
    let tokens: [String]
    let settled: [Bool]
    let meanEntropy: Double
}

struct ServerError: LocalizedError {
    let message: String
    var errorDescription: String? { message }
}

struct DiffusionClient {
    let url: URL
    var apiKey: String?

    /// Ask one question. Breaking out of the loop ends the request on the server within a denoising step.
    func stream(prompt: String, maxTokens: Int = 512, seed: Int? = nil) -> AsyncThrowingStream<Piece, Error> {
        AsyncThrowingStream { continuation in
            let task = Task {
                do {
                    let request = try makeRequest(prompt: prompt, maxTokens: maxTokens, seed: seed)
                    let (bytes, response) = try await URLSession.shared.bytes(for: request)
                    let isGood = (response as? HTTPURLResponse)?.statusCode == 200
                    for try await line in bytes.lines {
                        if !isGood {  // an error is one line of JSON
                            try read(Data(line.utf8), into: continuation)
                        } else if line.hasPrefix("data: "), line != "data: [DONE]" {
                            try read(Data(line.dropFirst(6).utf8), into: continuation)
                        }
                    }
                    continuation.finish()
                } catch {
                    continuation.finish(throwing: error)
                }
            }
            continuation.onTermination = { _ in task.cancel() }
        }
    }

    private func makeRequest(prompt: String, maxTokens: Int, seed: Int?) throws -> URLRequest {
        var request = URLRequest(url: url.appendingPathComponent("v1/chat/completions"))
        request.httpMethod = "POST"
        request.timeoutInterval = 600  // seconds without any data; the server sends a comment every 15
        request.setValue("application/json", forHTTPHeaderField: "Content-Type")
        if let apiKey { request.setValue("Bearer \(apiKey)", forHTTPHeaderField: "Authorization") }
        var body: [String: Any] = [
            "messages": [["role": "user", "content": prompt]],
            "max_tokens": maxTokens,
            "stream": true,
            "diffusion_frames": true,
        ]
        if let seed { body["seed"] = seed }
        request.httpBody = try JSONSerialization.data(withJSONObject: body)
        return request
    }

    private func read(_ data: Data, into continuation: AsyncThrowingStream<Piece, Error>.Continuation) throws {
        let chunk = try JSONDecoder().decode(Chunk.self, from: data)
        if let error = chunk.error { throw ServerError(message: error.message) }
        if let frame = chunk.frame { continuation.yield(.frame(frame)) }
        guard let choice = chunk.choices?.first else { return }
        if let text = choice.delta.reasoning_content, !text.isEmpty { continuation.yield(.reasoning(text)) }
        if let text = choice.delta.content, !text.isEmpty { continuation.yield(.text(text)) }
        if let reason = choice.finish_reason { continuation.yield(.end(reason)) }
    }
}

/// A `chat.completion.chunk`; one with a draft has a `type` of its own.
private struct Chunk: Decodable {
    struct Delta: Decodable {
        let content: String?
        let reasoning_content: String?
    }
    struct Choice: Decodable {
        let delta: Delta
        let finish_reason: String?
    }
    struct Diffusion: Decodable {
        let tokens: [String]
        let settled: [Bool]
        let mean_entropy: Double
    }
    struct Failure: Decodable {
        let message: String
    }
    let choices: [Choice]?
    let error: Failure?
    let type: String?
    let block: Int?
    let step: Int?
    let total: Int?
    let text: String?
    let diffusion: Diffusion?

    var frame: Frame? {
        guard type == "diffusion_frame", let block, let step, let total, let text, let diffusion else { return nil }
        return Frame(
            block: block, step: step, total: total, text: text, tokens: diffusion.tokens,
            settled: diffusion.settled, meanEntropy: diffusion.mean_entropy)
    }
}

@main
struct Main {
    static func main() async {
        let environment = ProcessInfo.processInfo.environment
        let address = environment["MLX_DIFFUSIONGEMMA_URL"] ?? "http://127.0.0.1:1234"
        guard let url = URL(string: address) else { return print("error: got the address \(address), expected a URL") }
        let client = DiffusionClient(url: url, apiKey: environment["MLX_DIFFUSIONGEMMA_API_KEY"])
        let prompt = CommandLine.arguments.dropFirst().joined(separator: " ")
        do {
            for try await piece in client.stream(prompt: prompt.isEmpty ? "Hello!" : prompt) {
                switch piece {
                case .frame(let frame):
                    let settled = frame.settled.filter { $0 }.count
                    let numbers = "step \(frame.step) of \(frame.total), \(settled) of \(frame.tokens.count) settled"
                    print("canvas \(frame.block + 1), \(numbers), entropy \(frame.meanEntropy)")
                case .reasoning(let text): print("(\(text))")
                case .text(let text): print(text)
                case .end(let reason): print("end: \(reason)")
                }
            }
        } catch {
            print("error: \(error.localizedDescription)")
        }
    }
}
