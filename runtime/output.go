package runtime

import (
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Where the output of a detached run goes, in state.json; "" is the log.
const (
	noLog        = "none"
	descriptorIs = "fd" // a file that the starter had open
)

// LogTo sets where the output of detached processes goes: "" to a log, none to nowhere, and fd:N to the file that this
// process has inherited as descriptor N. InvalidArgument: N is not an inherited descriptor that is open for writing.
func (r *Runtime) LogTo(to string) error {
	number, ok := strings.CutPrefix(to, "fd:")
	if !ok {
		if r.log = to; to != "" && to != noLog {
			return invalid("log %q: none, or fd:N for the descriptor N, is wanted", to)
		}
		return nil
	}
	n, err := strconv.ParseUint(number, 10, 16)
	if err != nil || n == 0 {
		return invalid("log %q: the number of a descriptor is wanted, such as fd:3", to)
	}
	fd := uintptr(n)
	own, err := unix.FcntlInt(fd, unix.F_GETFD, 0)
	if err != nil || own&unix.FD_CLOEXEC != 0 { // or this program has opened it itself
		return invalid("log %s: descriptor %d is not open: bash opens it by %d> >(COMMAND)", to, n, n)
	}
	if mode, err := unix.FcntlInt(fd, unix.F_GETFL, 0); err != nil || mode&unix.O_ACCMODE == unix.O_RDONLY || mode&unix.O_PATH != 0 {
		return invalid("log %s: descriptor %d is not open for writing", to, n)
	}
	dup, err := unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, shimRest)
	if err != nil {
		return err
	}
	r.log, r.output = descriptorIs, os.NewFile(uintptr(dup), to)
	return nil
}

// checkLog returns FailedPrecondition if the process keeps no log.
func (p *Process) checkLog() error {
	l, err := p.look()
	log := ""
	switch {
	case err != nil:
	case l.state != nil:
		log = l.state.Log
	case l.exit != nil:
		log = l.exit.Log
	}
	switch log {
	case noLog:
		return failed("%s has no log: it was started with --log none", p)
	case descriptorIs:
		return failed("%s has no log: who started it with --log has its output", p)
	}
	return nil
}
