// keel/main.h: the main of a trainer: from the command line to the exit status.
#pragma once

#include "run.h"

#ifndef KEEL_NO_MAIN
// A CPU that lacks an instruction of this program ends it by SIGILL, mostly before main: this says why.
[[gnu::constructor(101)]] static void explain_illegal_instruction() {
    signal(SIGILL, [](int) {
        static constexpr char text[] = "expected the kind of CPU that this program was compiled for, found one that "
                                       "lacks an instruction; "
                                       "build it here by make -B, or for any by make -B CXXFLAGS=-O3\n";
        if (write(2, text, sizeof text - 1) < 0) {}
        _exit(1);
    });
}
#endif

// text = what to say of the error that is being handled.
inline void describe_error(std::string& text) {
    try {
        throw;
    } catch (const Error& e) {
        text = e.what();
    } catch (const std::bad_alloc&) {
        text = "out of memory; use a smaller -b, -t, -C or -L, or -r layer";
    } catch (const std::system_error& e) {
        bool thread = e.code() == std::errc::resource_unavailable_try_again;
        text = thread ? "expected one more thread, found none to be had; raise the limit of processes (ulimit -u)"
                      : e.what();
    } catch (const std::exception& e) {
        text = e.what();
    } catch (...) {
        text = "ended by an exception of no known kind";
    }
}

// The main of a trainer: an error that the user can mend is one line on stderr and exit status 1.
template <IsTrainer Trainer>
int trainer_main(int argc, char** argv) {
    open_standard_streams();
    setvbuf(stdout, nullptr, _IOLBF, 0);
    StopSignals::ignore_file_size();
    RankSession<Trainer> session;
    std::string program = std::filesystem::path(argv[0]).filename(), text;
    text.reserve(4096);  // where there is no memory left, there is room to say so
    auto end = [&] {
        describe_error(text);
        fflush(stdout);
        if (session.lifeline) session.lifeline->fail_all(program, text);
        else session.launch.say(program, text);
        if (session.launch.ranks > 1) _exit(1);
        return 1;
    };
    try {
        session.launch = Launch::from_environment();
        const Options o = parse_command_line(argc, argv);
        if (o.help) {
            std::string ranks = Trainer::ranks_by
                                    ? format("one rank or many, by %s", Trainer::ranks_by)
                                    : format("one rank, as %s was not there when it was built", Trainer::ranks_needs);
            fputs(help_text(argv[0], ranks).c_str(), stdout);
            return 0;
        }
        refuse_unexpanded_paths(o);
        if (session.launch.rank > 0 && !freopen("/dev/null", "w", stdout)) {}  // rank 0 prints for all
        Run<Trainer> run(o, session);
        try {
            return run.run();
        } catch (...) {
            run.finish_writing();
            if (session.launch.ranks > 1) end();  // here: what frees the device could wait for ranks that are gone
            throw;
        }
    } catch (...) {
        return end();
    }
}
