// Streams, events and graphs. Work is queued, and runs only when the host synchronises: streams take turns in random
// order.
#pragma once

#include <chrono>

#include "calls.h"
#include "fibers.h"

namespace cuda_on_cpu {

struct EventState {
    uint64_t recorded = 0, completed = 0;  // how often it was recorded, by the host and by the device
    std::chrono::steady_clock::time_point time;
};

struct Capture {
    std::unique_ptr<CUgraph_st> graph;
    CUstream_st* origin = nullptr;
    cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
    std::thread::id thread;
    bool invalid = false;
};

// One launch of a graph: its nodes run in a random topological order, other streams' work between them.
struct GraphRun {
    CUgraphExec_st* graph;
    uint64_t ticket;  // launches of one graph run one after the other
    std::vector<size_t> missing;
    std::vector<size_t> ready;
    size_t left;
};

struct Operation {
    uint64_t number;  // in the order of the host's calls
    std::function<void()> run;
    std::shared_ptr<GraphRun> graph;
    std::shared_ptr<EventState> event;  // recorded, or waited for
    uint64_t version = 0;
    bool records = false;

    void record() {
        event->completed = std::max(event->completed, version);
        event->time = std::chrono::steady_clock::now();
    }
};

}  // namespace cuda_on_cpu

struct CUgraphNode_st {
    cudaGraphNodeType type;
    std::function<void()> run;
    std::vector<size_t> before;
};
struct CUgraph_st { std::vector<std::unique_ptr<CUgraphNode_st>> nodes; };
struct CUgraphExec_st {
    std::vector<std::function<void()>> nodes;
    std::vector<std::vector<size_t>> after;
    std::vector<size_t> missing;  // how many nodes each waits for
    uint64_t launched = 0, done = 0;
    bool destroyed = false;
};
struct CUstream_st {
    unsigned flags = 0;
    std::deque<cuda_on_cpu::Operation> queue;
    std::shared_ptr<cuda_on_cpu::Capture> capture;
    std::vector<size_t> frontier;  // while capturing: the nodes that the next one waits for
    bool destroyed = false;        // waits for its queue to run empty
};
struct CUevent_st {
    unsigned flags = 0;
    std::shared_ptr<cuda_on_cpu::EventState> state = std::make_shared<cuda_on_cpu::EventState>();
    std::weak_ptr<cuda_on_cpu::Capture> capture;
    bool captured = false;
    std::vector<size_t> frontier;
};

namespace cuda_on_cpu {

inline thread_local cudaError_t last_error = cudaSuccess;

struct Streams {
    std::vector<std::unique_ptr<CUstream_st>> all;  // all[0] is the legacy default stream
    std::vector<std::unique_ptr<CUgraphExec_st>> graphs;
    std::vector<std::weak_ptr<Capture>> captures;
    uint64_t operations = 0, polled_at = 0;
    uint32_t polls = 1;

    Streams() { all.push_back(std::make_unique<CUstream_st>()); }

    CUstream_st* legacy() { return all[0].get(); }
    CUstream_st* get(cudaStream_t stream) {
        if (!stream) return legacy();
        for (auto& s : all)
            if (s.get() == stream && !s->destroyed) return stream;
        return nullptr;
    }

    // What may not be called while a stream captures ends the capture.
    cudaError_t refuse_in_capture(bool allowed_if_relaxed = false) {
        cudaError_t result = cudaSuccess;
        for (auto& weak : captures) {
            auto capture = weak.lock();
            if (!capture || (allowed_if_relaxed && capture->mode == cudaStreamCaptureModeRelaxed)) continue;
            if (capture->mode == cudaStreamCaptureModeThreadLocal && capture->thread != std::this_thread::get_id())
                continue;
            capture->invalid = true, result = cudaErrorStreamCaptureUnsupported;
        }
        return result;
    }
    // The legacy stream waits for all blocking streams, those that capture too.
    cudaError_t refuse_implicit(CUstream_st* stream) {
        if (stream != legacy()) return cudaSuccess;
        cudaError_t result = cudaSuccess;
        for (auto& s : all)
            if (s->capture && !(s->flags & cudaStreamNonBlocking))
                s->capture->invalid = true, result = cudaErrorStreamCaptureImplicit;
        return result;
    }

    cudaError_t enqueue(cudaStream_t to, cudaGraphNodeType type, std::function<void()> run) {
        CUstream_st* stream = get(to);
        if (!stream) return cudaErrorInvalidResourceHandle;
        if (stream->capture) {
            if (stream->capture->invalid) return cudaErrorStreamCaptureInvalidated;
            auto& nodes = stream->capture->graph->nodes;
            nodes.push_back(std::make_unique<CUgraphNode_st>(CUgraphNode_st{type, std::move(run), stream->frontier}));
            stream->frontier = {nodes.size() - 1};
            return cudaSuccess;
        }
        if (cudaError_t error = refuse_implicit(stream)) return error;
        stream->queue.push_back({operations++, std::move(run), nullptr, nullptr});
        return cudaSuccess;
    }

    bool runnable(CUstream_st* stream) {
        if (stream->queue.empty()) return false;
        Operation& first = stream->queue.front();
        if (stream == legacy()) {
            for (auto& s : all)
                if (s.get() != stream && !(s->flags & cudaStreamNonBlocking) && !s->queue.empty() &&
                    s->queue.front().number < first.number)
                    return false;
        } else if (!(stream->flags & cudaStreamNonBlocking) && !legacy()->queue.empty() &&
                   legacy()->queue.front().number < first.number) {
            return false;
        }
        if (first.event && !first.records && first.event->completed < first.version) return false;
        return !first.graph || first.graph->ticket == first.graph->graph->done;
    }

    // Runs one operation, or one node of a graph, of a random stream. False if there is none.
    bool step() {
        CUstream_st* chosen = nullptr;
        uint32_t count = 0;
        Random& random = shared_state().random();
        for (auto& s : all)
            if (runnable(s.get()) && random.below(++count) == 0) chosen = s.get();
        if (!chosen) return false;
        Operation& first = chosen->queue.front();
        if (first.graph) {
            if (run_node(*first.graph)) return true;
            first.graph->graph->done++;
        } else if (first.run) {
            first.run();
        } else if (first.records) {
            first.record();
        }
        if (shared_state().sticky) drop_all();
        else chosen->queue.pop_front();
        return true;
    }
    // False once the last node has run.
    static bool run_node(GraphRun& graph) {
        if (graph.left == 0) return false;
        size_t i = shared_state().random().below(uint32_t(graph.ready.size())), node = graph.ready[i];
        graph.ready[i] = graph.ready.back();
        graph.ready.pop_back();
        graph.graph->nodes[node]();
        for (size_t next : graph.graph->after[node])
            if (--graph.missing[next] == 0) graph.ready.push_back(next);
        return --graph.left > 0 && !shared_state().sticky;
    }
    void drop_all() {
        for (auto& s : all) {
            for (Operation& o : s->queue)
                if (o.records) o.record();
            s->queue.clear();
        }
        for (auto& g : graphs) g->done = g->launched;
    }

    // Runs queued work, of whatever stream, until `done` holds.
    template <class Done>
    cudaError_t run_until(Done&& done) {
        if (!done()) {
            DeviceRunning running;
            while (!shared_state().sticky && !done())
                if (!step()) report_misuse("the streams wait for each other", true);
        }
        sweep();
        return shared_state().sticky;
    }
    cudaError_t synchronise(CUstream_st* stream) {
        return run_until([stream] { return stream->queue.empty(); });
    }
    cudaError_t synchronise_all() {
        return run_until([this] {
            for (auto& s : all)
                if (!s->queue.empty()) return false;
            return true;
        });
    }
    // What has run by the time the host asks: one operation, and more each time it asks again with nothing new to do,
    // as a host that polls has time.
    void run_some() {
        DeviceRunning running;
        polls = std::exchange(polled_at, operations) == operations ? std::min(2 * polls, 256u) : 1;
        for (uint32_t n = polls; n > 0 && !shared_state().sticky && step(); n--) {}
    }
    void sweep() {
        std::erase_if(all, [](auto& s) { return s->destroyed && s->queue.empty(); });
        std::erase_if(graphs, [](auto& g) { return g->destroyed && g->done == g->launched; });
        std::erase_if(captures, [](auto& c) { return c.expired(); });
    }

    cudaError_t record(CUevent_st* event, cudaStream_t to) {
        CUstream_st* stream = get(to);
        if (!stream || !event) return cudaErrorInvalidResourceHandle;
        if (stream->capture) {
            if (stream->capture->invalid) return cudaErrorStreamCaptureInvalidated;
            event->captured = true, event->capture = stream->capture, event->frontier = stream->frontier;
            return cudaSuccess;
        }
        if (cudaError_t error = refuse_implicit(stream)) return error;
        event->captured = false;
        stream->queue.push_back({operations++, nullptr, nullptr, event->state, ++event->state->recorded, true});
        return cudaSuccess;
    }
    cudaError_t wait(cudaStream_t to, CUevent_st* event) {
        CUstream_st* stream = get(to);
        if (!stream || !event) return cudaErrorInvalidResourceHandle;
        if (event->captured) {
            auto capture = event->capture.lock();
            if (!capture) return cudaErrorCapturedEvent;
            if (capture->invalid) return cudaErrorStreamCaptureInvalidated;
            if (stream->capture && stream->capture != capture) {
                stream->capture->invalid = capture->invalid = true;
                return cudaErrorStreamCaptureMerge;
            }
            if (!stream->capture) {
                if (stream == legacy()) return capture->invalid = true, cudaErrorStreamCaptureImplicit;
                stream->capture = capture, stream->frontier.clear();
            }
            for (size_t node : event->frontier)
                if (std::find(stream->frontier.begin(), stream->frontier.end(), node) == stream->frontier.end())
                    stream->frontier.push_back(node);
            return cudaSuccess;
        }
        if (stream->capture) {
            stream->capture->invalid = true;
            return cudaErrorStreamCaptureIsolation;
        }
        stream->queue.push_back({operations++, nullptr, nullptr, event->state, event->state->recorded, false});
        return cudaSuccess;
    }

    cudaError_t begin_capture(cudaStream_t of, cudaStreamCaptureMode mode) {
        CUstream_st* stream = get(of);
        if (!stream) return cudaErrorInvalidResourceHandle;
        if (stream == legacy()) return cudaErrorStreamCaptureUnsupported;
        if (stream->capture) return cudaErrorIllegalState;
        stream->capture = std::make_shared<Capture>();
        stream->capture->graph = std::make_unique<CUgraph_st>();
        stream->capture->origin = stream, stream->capture->mode = mode,
        stream->capture->thread = std::this_thread::get_id();
        stream->frontier.clear();
        captures.push_back(stream->capture);
        return cudaSuccess;
    }
    cudaError_t end_capture(cudaStream_t of, cudaGraph_t* graph) {
        *graph = nullptr;
        CUstream_st* stream = get(of);
        if (!stream) return cudaErrorInvalidResourceHandle;
        if (!stream->capture) return cudaErrorIllegalState;
        auto capture = stream->capture;
        if (capture->origin != stream) {
            capture->invalid = true;
            return cudaErrorStreamCaptureUnmatched;
        }
        // Everything that was captured must come before the end of the stream that began.
        std::vector<bool> joined(capture->graph->nodes.size());
        std::vector<size_t> open = stream->frontier;
        while (!open.empty()) {
            size_t node = open.back();
            open.pop_back();
            if (joined[node]) continue;
            joined[node] = true;
            for (size_t before : capture->graph->nodes[node]->before) open.push_back(before);
        }
        bool all_joined = true;
        for (auto& s : all) {
            if (s->capture != capture) continue;
            for (size_t node : s->frontier) all_joined = all_joined && joined[node];
            s->capture = nullptr, s->frontier.clear();
        }
        if (capture->invalid) return cudaErrorStreamCaptureInvalidated;
        if (!all_joined) return cudaErrorStreamCaptureUnjoined;
        *graph = capture->graph.release();
        return cudaSuccess;
    }

    cudaError_t instantiate(cudaGraphExec_t* exec, cudaGraph_t graph) {
        auto made = std::make_unique<CUgraphExec_st>();
        made->after.resize(graph->nodes.size());
        for (size_t i = 0; i < graph->nodes.size(); i++) {
            made->nodes.push_back(graph->nodes[i]->run);
            made->missing.push_back(graph->nodes[i]->before.size());
            for (size_t before : graph->nodes[i]->before) made->after[before].push_back(i);
        }
        *exec = made.get();
        graphs.push_back(std::move(made));
        return cudaSuccess;
    }
    cudaError_t launch_graph(cudaGraphExec_t exec, cudaStream_t to) {
        CUstream_st* stream = get(to);
        if (!stream || !exec) return cudaErrorInvalidResourceHandle;
        if (stream->capture) return stream->capture->invalid = true, cudaErrorNotSupported;  // a child graph
        if (cudaError_t error = refuse_implicit(stream)) return error;
        auto run = std::make_shared<GraphRun>(GraphRun{exec, exec->launched++, exec->missing, {}, exec->nodes.size()});
        for (size_t i = 0; i < exec->nodes.size(); i++)
            if (exec->missing[i] == 0) run->ready.push_back(i);
        stream->queue.push_back({operations++, nullptr, std::move(run), nullptr});
        return cudaSuccess;
    }
};
inline Streams& streams() {
    // Built first, so that they outlive the streams.
    shared_state(), memory(), pool(), calls();
    static Streams instance;
    return instance;
}

// The frame of every call of the runtime: one at a time; after device misuse all fail. name: the caller's.
template <class Body>
cudaError_t api(Body&& body, bool even_after_misuse = false, const char* name = __builtin_FUNCTION()) {
    std::lock_guard lock(shared_state().mutex);
    Streams& s = streams();
    cudaError_t result = fault_of_call(name);
    if (!result && (!shared_state().sticky || even_after_misuse)) result = body(s);
    if (shared_state().sticky) result = shared_state().sticky;
    if (result) last_error = result;
    return result;
}

// Forgets the misuse, or a fault that stays, and the work that it left behind.
inline void clear_misuse() {
    std::lock_guard lock(shared_state().mutex);
    streams().drop_all();
    std::lock_guard misuse_lock(shared_state().misuse_mutex);
    shared_state().misuse.clear();
    shared_state().sticky = cudaSuccess;
    calls().memory_gone = false;
    last_error = cudaSuccess;
}

}  // namespace cuda_on_cpu
