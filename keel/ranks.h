// keel/ranks.h: the processes of one run, on one machine or many.
//
// The launcher's environment says who they are (launch.h). What they compute travels by MPI or NCCL (each trainer's
// Communicator). The lifeline below tells whether all of them still live, and why one does not: MPI or NCCL alone would
// wait for a dead rank for ever.
#pragma once

#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/wait.h>
#ifdef KEEL_MPI
#include <mpi.h>
#endif

#include <atomic>
#include <exception>
#include <functional>
#include <mutex>

#include "launch.h"
#include "system.h"

#ifdef KEEL_MPI
inline void check_mpi(int error, const char* what) {
    if (error == MPI_SUCCESS) return;
    char text[MPI_MAX_ERROR_STRING] = "";
    int length = 0;
    MPI_Error_string(error, text, &length);
    fail("%s: %s", what, text);
}

// Prints a text where the process ends before the scope does. MPI_Init ends it without a return or an exit handler, so
// another process sees to it.
class LastWord {
public:
    explicit LastWord(const std::string& text) {
        if (pipe2(ends, O_CLOEXEC) != 0) return;
        child = fork();
        if (child == 0) {
            char byte;
            close(ends[1]);
            if (read(ends[0], &byte, 1) == 0 && write(2, text.data(), text.size()) < 0) {}
            _exit(0);
        }
        close(ends[0]);
    }
    ~LastWord() {
        if (child > 0) kill(child, SIGKILL), waitpid(child, nullptr, 0);
        if (ends[1] >= 0) close(ends[1]);
    }
    LastWord(const LastWord&) = delete;
    LastWord& operator=(const LastWord&) = delete;

private:
    int ends[2] = {-1, -1};
    pid_t child = -1;
};

// MPI from here to the end of the scope. An error that leaves the scope does not close it: MPI_Finalize would wait for
// the other ranks.
struct MpiSession {
    explicit MpiSession(const Launch& launch) {
        int provided, ranks = 0, rank = 0;
        {
            LastWord word(format("rank %d: MPI_Init has ended this process, as MPI says above; start each program by "
                                 "an mpirun of its own; %s\n",
                                 launch.rank, launch.if_stale()));
            StartWatch watch(launch, [n = launch.ranks] { return format("the others of %d ranks in MPI_Init", n); });
            MPI_Init_thread(nullptr, nullptr, MPI_THREAD_FUNNELED, &provided);
        }
        MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN);
        MPI_Comm_size(MPI_COMM_WORLD, &ranks), MPI_Comm_rank(MPI_COMM_WORLD, &rank);
        if (ranks != launch.ranks || rank != launch.rank)
            fail("MPI: expected rank %d of %d as %s and %s say, found rank %d of %d; launch with the mpirun of the MPI "
                 "that this was built with, or srun --mpi=pmix; %s",
                 launch.rank, launch.ranks, launch.rank_variable, launch.ranks_variable, rank, ranks,
                 launch.if_stale());
    }
    ~MpiSession() {
        if (!std::uncaught_exceptions()) MPI_Finalize();
    }
    MpiSession(const MpiSession&) = delete;
    MpiSession& operator=(const MpiSession&) = delete;

    // Whether the launcher has prepared MPI: srun does so only with --mpi=pmix or pmi2, and what starts ranks by RANK
    // and WORLD_SIZE may itself run under mpirun, as one of its ranks.
    static bool offered(const Launch& launch) {
        return launch.rank_variable != "RANK" &&
               (getenv("OMPI_COMM_WORLD_SIZE") || getenv("PMI_SIZE") || getenv("PMIX_RANK"));
    }
};
#endif

// A TCP connection between rank 0 and each other rank, with a thread at each end. The kernel closes a process's
// connections when it ends, however it ends: so rank 0 sees at once that a rank has died, tells the others which, and
// all end. A machine that falls silent shows by missing heartbeats, and a rank that ends by an error first says why. So
// no rank waits for a step that cannot be finished.
class Lifeline {
public:
    // Seconds of silence after which a rank is given up; ten signs of life are due in that time. Tests make it smaller.
    static inline double silence = 20;

    // exchange gives rank 0's "host:port" to all ranks by MPI; where it is empty, the address comes from the
    // environment. unique_id: bytes of rank 0 that all ranks get (NCCL's id). device: what no two ranks may share.
    Lifeline(const Launch& launch, const std::function<void(std::string&)>& exchange, std::span<char> unique_id,
             const std::string& device = "")
        : launch(launch), device(device) {
        if (launch.ranks <= 1) return;
        {
            StartWatch watch(launch, [this, n = launch.ranks, first = launch.rank == 0] {
                return first ? format("%d of %d ranks", n - 1 - come, n) : format("rank 0 of %d ranks", n);
            });
            launch.rank == 0 ? gather_ranks(exchange, unique_id) : find_rank_0(exchange, unique_id);
        }
        thread = std::thread([this] { watch(); });
    }
    ~Lifeline() { close_all(std::uncaught_exceptions() > 0); }
    Lifeline(const Lifeline&) = delete;
    Lifeline& operator=(const Lifeline&) = delete;

    // Ends all ranks, as this one ends by an error: rank 0 prints the text of the first rank to fail, and the others
    // end with it. The caller then ends the process.
    void fail_all(const std::string& program, const std::string& text) {
        if (launch.rank == 0) {
            end_with(program + ": " + text, ERROR, text, false);
            return;
        }
        for (Peer& peer : peers)
            send_message(peer, ERROR, format("rank %d (%s): %s", launch.rank, process_name(), text));
        failing = true;
        // Rank 0 prints this, answers with an error, which ends this process, and ends. Or else we print.
        for (double until = seconds() + StartLimits::rank_0; seconds() < until && !rank_0_gone;) usleep(10000);
        fprintf(stderr, "%s: rank %d: %s\n", program.c_str(), launch.rank, text.c_str());
    }

private:
    enum Kind : uint8_t { HELLO, ALIVE, ERROR, DEATH, GOODBYE };
    struct MessageHead {
        uint32_t magic = 0x4c45454b;  // "KEEL"
        Kind kind{};
        uint32_t rank = 0, ranks = 0, bytes = 0;
    };
    struct Peer {
        int fd = -1, rank = -1;
        std::string name;      // "process 1234 on node7"
        std::string device;    // known to rank 0
        double heard = 0;      // when it last gave a sign of life
        bool left = false;     // it has said goodbye
        std::string received;  // bytes of a message that is not whole yet
    };
    Launch launch;
    std::string device;
    std::vector<Peer> peers;  // of rank 0: all others; of another: rank 0
    std::thread thread;
    std::mutex sending;
    std::atomic<int> come = 0;  // ranks that have connected to rank 0
    std::atomic<bool> stop = false, ended = false, failing = false, rank_0_gone = false;

    void send_message(Peer& peer, Kind kind, const std::string& text) {
        MessageHead head;
        head.kind = kind, head.rank = uint32_t(launch.rank), head.ranks = uint32_t(launch.ranks),
        head.bytes = uint32_t(text.size());
        std::string bytes(reinterpret_cast<const char*>(&head), sizeof head);
        bytes += text;
        std::lock_guard lock(sending);
        if (peer.fd < 0) return;
        send(peer.fd, bytes.data(), bytes.size(), MSG_NOSIGNAL | MSG_DONTWAIT);  // read_bytes sees if the peer is gone
    }

    // Waits for one message; false if the connection ends or nothing comes in time.
    static bool receive_message(Peer& peer, MessageHead& head, std::string& text, double until) {
        while (!take_message(peer, head, text)) {
            pollfd p{peer.fd, POLLIN, 0};
            double left = until - seconds();
            if (left <= 0 || poll(&p, 1, int(left * 1000) + 1) < 0 || !read_bytes(peer)) return false;
        }
        return true;
    }
    static bool read_bytes(Peer& peer) {  // what has come so far; false at the connection's end
        char bytes[4096];
        ssize_t n = recv(peer.fd, bytes, sizeof bytes, MSG_DONTWAIT);
        if (n > 0) peer.received.append(bytes, size_t(n)), peer.heard = seconds();
        return n > 0 || (n < 0 && (errno == EAGAIN || errno == EINTR));
    }
    static bool take_message(Peer& peer, MessageHead& head, std::string& text) {
        if (peer.received.size() < sizeof head) return false;
        memcpy(&head, peer.received.data(), sizeof head);
        if (head.magic != MessageHead().magic || head.bytes > (1u << 20))
            fail("a rank's connection: expected a KEEL trainer at its other end, found another program");
        if (peer.received.size() < sizeof head + head.bytes) return false;
        text = peer.received.substr(sizeof head, head.bytes);
        peer.received.erase(0, sizeof head + head.bytes);
        return true;
    }

    // Rank 0's address from the environment: MASTER_ADDR and MASTER_PORT, or the first node of Slurm's step and a port
    // made of the job's number.
    std::string fixed_address() const {
        if (const char* host = getenv("MASTER_ADDR")) {
            int64_t port = 29400;
            if (getenv("MASTER_PORT")) port = Launch::parse("MASTER_PORT", 1, 65534, "MASTER_ADDR");
            const char* taken = getenv("TORCHELASTIC_USE_AGENT_STORE");  // torchrun listens on the port itself
            return format("%s:%lld", host, port + (taken && strcmp(taken, "True") == 0));
        }
        if (const char* nodes = getenv("SLURM_STEP_NODELIST")) {  // "node[017-020,031]"
            std::string list = nodes, first = list.substr(0, list.find_first_of("[,"));
            if (size_t open = list.find('['); open != std::string::npos && open == first.size())
                first += list.substr(open + 1, list.find_first_of("-,]", open) - open - 1);
            int64_t job = getenv("SLURM_JOB_ID") ? atoll(getenv("SLURM_JOB_ID")) : 0,
                    step = getenv("SLURM_STEP_ID") ? atoll(getenv("SLURM_STEP_ID")) : 0;
            return format("%s:%lld", first, 20000 + (job * 17 + step) % 20000);
        }
        fail("ranks: expected to be told where rank 0 is, found none of MPI, KEEL_RENDEZVOUS (a file that all ranks "
             "see), MASTER_ADDR, SLURM_STEP_NODELIST; set one");
    }

    void gather_ranks(const std::function<void(std::string&)>& exchange, std::span<char> unique_id) {
        const char* file = getenv("KEEL_RENDEZVOUS");
        std::string address = exchange || file ? "" : fixed_address();
        int listener = socket(AF_INET6, SOCK_STREAM | SOCK_CLOEXEC, 0), on = 1, off = 0;
        bool v6 = listener >= 0;
        if (!v6) listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
        if (v6) setsockopt(listener, IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof off);
        uint16_t port = address.empty() ? 0 : uint16_t(atoi(address.substr(address.rfind(':') + 1).c_str()));
        sockaddr_in6 a6{};
        sockaddr_in a4{};
        a6.sin6_family = AF_INET6, a6.sin6_port = htons(port), a6.sin6_addr = in6addr_any;
        a4.sin_family = AF_INET, a4.sin_port = htons(port), a4.sin_addr.s_addr = htonl(INADDR_ANY);
        if (bind(listener, v6 ? reinterpret_cast<sockaddr*>(&a6) : reinterpret_cast<sockaddr*>(&a4),
                 v6 ? sizeof a6 : sizeof a4) != 0 ||
            listen(listener, SOMAXCONN) != 0)
            fail("ranks: rank 0 cannot listen on port %d (%s); set MASTER_PORT to another", int(port), strerror(errno));
        if (address.empty()) {
            socklen_t size = v6 ? sizeof a6 : sizeof a4;
            getsockname(listener, v6 ? reinterpret_cast<sockaddr*>(&a6) : reinterpret_cast<sockaddr*>(&a4), &size);
            char host[256] = "127.0.0.1";
            if (const char* given = getenv("MASTER_ADDR")) snprintf(host, sizeof host, "%s", given);
            else if (launch.local_ranks != launch.ranks) gethostname(host, sizeof host - 1);
            address = format("%s:%d", host, int(ntohs(v6 ? a6.sin6_port : a4.sin_port)));
            if (exchange) exchange(address);
            if (!exchange) write_rendezvous(file, address);
        }
        peers.resize(size_t(launch.ranks) - 1);
        double until = seconds() + StartLimits::all, beat = 0;
        while (come < launch.ranks - 1) {
            pollfd p{listener, POLLIN, 0};
            bool somebody = poll(&p, 1, 100) > 0;
            double now = seconds();
            if (now > until) {
                auto absent = std::find_if(peers.begin(), peers.end(), [](const Peer& peer) { return peer.fd < 0; });
                fail_start(format("ranks: expected %d within %.0f s, found %d, rank %d not among them; see to the "
                                  "machines of the others; %s",
                                  launch.ranks, StartLimits::all, come + 1, int(absent - peers.begin()) + 1,
                                  launch.if_stale()));
            }
            for (Peer& peer : peers)  // those that are there may fail, and are not to take our waiting for silence
                if (peer.fd >= 0) peer.heard = now, attend(peer, true, now);
            if (now - beat > silence / 10) {
                beat = now;
                for (Peer& peer : peers) send_message(peer, ALIVE, "");
            }
            if (somebody) greet(listener, unique_id);
        }
        close(listener);
        if (file && !exchange) unlink(file);
    }

    // Takes one rank's connection.
    void greet(int listener, std::span<char> unique_id) {
        Peer peer;
        peer.fd = accept4(listener, nullptr, nullptr, SOCK_CLOEXEC);
        if (peer.fd < 0) return;
        MessageHead head;
        bool one_of_us = false;
        try {
            one_of_us = receive_message(peer, head, peer.name, seconds() + 10) && head.kind == HELLO &&
                        head.ranks == uint32_t(launch.ranks) && head.rank > 0 && head.rank < head.ranks &&
                        peers[head.rank - 1].fd < 0;
        } catch (const Error&) {}  // another program
        if (!one_of_us) {
            close(peer.fd);
            return;
        }
        int on = 1;
        peer.rank = int(head.rank);
        setsockopt(peer.fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        send_message(peer, HELLO, std::string(unique_id.data(), unique_id.size()) + process_name());
        if (size_t end = peer.name.find('\n'); end != std::string::npos)
            peer.device = peer.name.substr(end + 1), peer.name.resize(end);
        for (int r = 0; r < launch.ranks && !peer.device.empty(); r++)
            if ((r == 0 ? device : peers[size_t(r) - 1].device) == peer.device) {
                send_message(peer, ERROR, "");
                fail_start(format("ranks: expected a GPU for each, found ranks %d and %d with %s; start as many as "
                                  "there are GPUs, and see that LOCAL_RANK or CUDA_VISIBLE_DEVICES is each one's own",
                                  r, peer.rank, peer.device));
            }
        peers[head.rank - 1] = std::move(peer);
        come++;
    }

    [[noreturn]] void fail_start(const std::string& text) {  // the ranks that are there end without a word of their own
        for (Peer& peer : peers) send_message(peer, ERROR, text);
        throw Error(text);
    }

    static void write_rendezvous(const char* file, const std::string& address) {
        std::string temporary = std::string(file) + ".tmp";
        FILE* out = fopen(temporary.c_str(), "we");
        bool good = out && fprintf(out, "%s\n", address.c_str()) > 0;
        if (out) good = fclose(out) == 0 && good;
        if (!good || rename(temporary.c_str(), file) != 0)
            fail("KEEL_RENDEZVOUS: %s cannot be written (%s); name a file in a folder that all ranks see", file,
                 strerror(errno));
    }

    void find_rank_0(const std::function<void(std::string&)>& exchange, std::span<char> unique_id) {
        const char* file = getenv("KEEL_RENDEZVOUS");
        std::string address;
        if (exchange) exchange(address);
        else if (!file) address = fixed_address();
        Peer peer;
        peer.rank = 0;
        for (double until = seconds() + StartLimits::all;;) {
            if (!exchange && file) {  // read again each time: an earlier run may have left an old address
                char text[300] = "";
                if (FILE* in = fopen(file, "re")) {
                    if (fscanf(in, "%299s", text) != 1) *text = 0;
                    fclose(in);
                }
                address = text;
            }
            MessageHead head;
            std::string given;
            if (!address.empty() && connect_to(peer, address)) {
                send_message(peer, HELLO, process_name() + "\n" + device);
                if (receive_message(peer, head, given, seconds() + StartLimits::all) && head.kind == HELLO &&
                    given.size() >= unique_id.size()) {
                    std::copy_n(given.begin(), unique_id.size(), unique_id.begin());
                    peer.name = given.substr(unique_id.size());
                    break;
                }
                close(peer.fd), peer.fd = -1, peer.received.clear();
            }
            if (seconds() > until)
                fail("ranks: expected rank 0 at %s within %.0f s, found nobody; see to the network, or set "
                     "MASTER_ADDR; %s",
                     address.empty() ? file : address, StartLimits::all, launch.if_stale());
            usleep(200000);
        }
        peers.push_back(std::move(peer));
    }
    static bool connect_to(Peer& peer, const std::string& address) {
        size_t colon = address.rfind(':');
        addrinfo hints{}, *found = nullptr;
        hints.ai_socktype = SOCK_STREAM;
        if (getaddrinfo(address.substr(0, colon).c_str(), address.substr(colon + 1).c_str(), &hints, &found) != 0)
            return false;
        for (addrinfo* a = found; a && peer.fd < 0; a = a->ai_next) {
            int fd = socket(a->ai_family, a->ai_socktype | SOCK_CLOEXEC, a->ai_protocol), on = 1;
            if (fd < 0) continue;
            setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
            if (connect(fd, a->ai_addr, a->ai_addrlen) == 0) peer.fd = fd;
            else close(fd);
        }
        freeaddrinfo(found);
        return peer.fd >= 0;
    }

    void watch() {
        try {
            attend_all();
        } catch (const std::exception& e) {  // there is no memory left even for this
            fprintf(stderr, "rank %d: out of memory (%s)\n", launch.rank, e.what());
            _exit(1);
        }
    }
    void attend_all() {
        double now = seconds(), beat = 0;
        for (Peer& peer : peers) peer.heard = now;
        while (!stop) {
            std::vector<pollfd> polled;
            for (Peer& peer : peers) polled.push_back({peer.left ? -1 : peer.fd, POLLIN, 0});
            poll(polled.data(), nfds_t(polled.size()), 100);
            double before = std::exchange(now, seconds());
            if (now - before > silence / 2)  // this process was stopped, not the others
                for (Peer& peer : peers) peer.heard = now;
            for (size_t i = 0; i < peers.size() && !stop; i++)
                if (!peers[i].left) attend(peers[i], polled[i].revents != 0, now);
            if (now - beat < silence / 10) continue;
            beat = now;
            for (Peer& peer : peers) send_message(peer, ALIVE, "");
        }
    }

    void attend(Peer& peer, bool readable, double now) {
        bool open = !readable || read_bytes(peer);
        MessageHead head;
        std::string text;
        try {
            while (take_message(peer, head, text)) {
                if (head.kind == GOODBYE) peer.left = true;
                if (head.kind == ERROR || head.kind == DEATH)
                    end_with(launch.rank == 0 || head.kind == DEATH ? text : "", ERROR, text, true);
            }
        } catch (const Error&) {
            open = false;
        }
        if (peer.left || stop) return;
        if (!open && launch.rank != 0) rank_0_gone = true;
        if (failing) return;  // by this rank's own error, which rank 0 has been sent
        if (open && now - peer.heard < silence) return;
        std::string how = open ? format("has given no sign of life for %.0f s", silence) : "has died";
        text = format("rank %d (%s) %s; all ranks end, and -y goes on from the last whole checkpoint", peer.rank,
                      peer.name, how);
        end_with(text, DEATH, text, true);
    }

    // Once: prints why, tells the others if this is rank 0, and ends the process if asked to.
    void end_with(const std::string& ours, Kind kind, const std::string& for_others, bool exit_now) {
        if (ended.exchange(true)) {
            if (exit_now) stop = true;
            return;
        }
        // Printed before the others know: when the first of them ends, a launcher may end this process too.
        if (!ours.empty())
            fprintf(stderr, "%s%s\n", exit_now ? format("rank %d: ", launch.rank).c_str() : "", ours.c_str());
        if (launch.rank == 0)
            for (Peer& peer : peers) send_message(peer, kind, for_others);
        if (launch.rank == 0) usleep(200000);  // time for the others to read it: a launcher may end them with us
        if (exit_now) _exit(1);
    }

    void close_all(bool by_error) {
        if (!by_error)
            for (Peer& peer : peers) send_message(peer, GOODBYE, "");
        stop = true;
        if (thread.joinable()) thread.join();
        for (Peer& peer : peers) close(peer.fd);
    }
};

// The Communicator of a build that has one rank.
struct NoCommunicator {
    struct UniqueId {
        explicit UniqueId(bool) {}
    };
    NoCommunicator(const Launch&, const UniqueId&) {}
    static std::string device() { return ""; }
    void gather(const void*, void*, size_t) {}
};

// Exchanges what ranks tell each other beside tensors: a few bytes from each to all. A rank alone gets its own back.
class Ranks {
public:
    // all (ranks, bytes): mine of every rank, in rank order
    using Gather = std::function<void(const void* mine, void* all, size_t bytes)>;

    Ranks() = default;
    Ranks(const Launch& launch, Gather gather) : launch(launch), gather_bytes(std::move(gather)) {}

    explicit operator bool() const { return launch.ranks > 0; }  // there are several
    int rank() const { return launch.rank; }
    int count() const { return std::max(1, launch.ranks); }

    void gather(const void* mine, void* all, size_t bytes) const {
        if (gather_bytes) gather_bytes(mine, all, bytes);
        else memcpy(all, mine, bytes);
    }
    template <class T>
    std::vector<T> gather(const T& mine) const {
        std::vector<T> all(size_t(count()), mine);
        gather(&mine, all.data(), sizeof mine);
        return all;
    }
    void broadcast(void* data, size_t bytes) const {  // rank 0's data to all
        std::vector<char> all(bytes * size_t(count()));
        gather(data, all.data(), bytes);
        std::copy_n(all.begin(), bytes, static_cast<char*>(data));
    }
    bool all(bool mine) const {
        bool every = true;
        for (char c : gather(char(mine))) every = every && c;
        return every;
    }
    void barrier() const { all(true); }
    double sum(double mine) const {  // in rank order
        double total = 0;
        for (double x : gather(mine)) total += x;
        return total;
    }

private:
    Launch launch;
    Gather gather_bytes;
};

// What connects this process to the other ranks: MPI where the build has it, the lifeline, and what carries tensors.
template <class Trainer>
struct RankSession {
    Launch launch;
#ifdef KEEL_MPI
    std::unique_ptr<MpiSession> mpi;
#endif
    std::unique_ptr<Lifeline> lifeline;
    std::unique_ptr<typename Trainer::Communicator> communicator;  // null: alone

    void start() {
        if (!launch.warning.empty()) warn(launch.warning + ": this is a run of one rank");
        if (launch.ranks == 1) launch.ranks = 0;  // a run of one rank has the bits of one that no launcher started
        if (launch.ranks == 0) return;
        if (!Trainer::ranks_by)
            fail("%s: this build has one rank, found %d started; install %s and build again, or start one; %s",
                 launch.launcher, launch.ranks, Trainer::ranks_needs, launch.if_stale());
        using UniqueId = typename Trainer::Communicator::UniqueId;
        std::function<void(std::string&)> exchange;
#ifdef KEEL_MPI
        if (MpiSession::offered(launch) || std::string(Trainer::ranks_by) == "MPI") {
            mpi = std::make_unique<MpiSession>(launch);
            exchange = [](std::string& address) {
                char text[300] = "";
                snprintf(text, sizeof text, "%s", address.c_str());
                check_mpi(MPI_Bcast(text, sizeof text, MPI_CHAR, 0, MPI_COMM_WORLD), "MPI_Bcast");
                address = text;
            };
        }
#endif
        UniqueId id(launch.rank == 0);
        lifeline = std::make_unique<Lifeline>(launch, exchange, std::span(reinterpret_cast<char*>(&id), sizeof id),
                                              Trainer::Communicator::device());
        communicator = std::make_unique<typename Trainer::Communicator>(launch, id);
    }
    Ranks ranks() const {
        if (!communicator) return {};
        return {launch,
                [c = communicator.get()](const void* mine, void* all, size_t bytes) { c->gather(mine, all, bytes); }};
    }
};
