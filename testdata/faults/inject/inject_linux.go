// The kernel passes the system calls in question to the caller of [Run] (seccomp_unotify(2)), which counts those that
// concern a directory, over all threads, and answers one of them with an error. That call is then not made.
package inject

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// kind says how a system call's arguments name the file that it concerns.
type kind int

const (
	byFD    kind = iota // argument 0 is a descriptor
	byOut               // argument 2 is the descriptor written to
	byPath              // arguments 0 and 1 are a directory's descriptor and a path
	byPaths             // so are arguments 2 and 3
	byLink              // argument 0 is a text, arguments 1 and 2 a directory's descriptor and a path
	always              // whatever it concerns
)

// calls are the system calls that can be made to fail, by name.
var calls = map[string]struct {
	number uintptr
	kind   kind
}{
	"write": {unix.SYS_WRITE, byFD}, "pwrite64": {unix.SYS_PWRITE64, byFD},
	"read": {unix.SYS_READ, byFD}, "pread64": {unix.SYS_PREAD64, byFD}, "getdents64": {unix.SYS_GETDENTS64, byFD},
	"fsync": {unix.SYS_FSYNC, byFD}, "fdatasync": {unix.SYS_FDATASYNC, byFD}, "syncfs": {unix.SYS_SYNCFS, byFD},
	"close": {unix.SYS_CLOSE, byFD}, "ftruncate": {unix.SYS_FTRUNCATE, byFD}, "flock": {unix.SYS_FLOCK, byFD},
	"fchmod": {unix.SYS_FCHMOD, byFD}, "fchown": {unix.SYS_FCHOWN, byFD}, "fsetxattr": {unix.SYS_FSETXATTR, byFD},
	"copy_file_range": {unix.SYS_COPY_FILE_RANGE, byOut}, "splice": {unix.SYS_SPLICE, byOut}, "sendfile": {unix.SYS_SENDFILE, byFD},
	"renameat": {unix.SYS_RENAMEAT, byPaths}, "renameat2": {unix.SYS_RENAMEAT2, byPaths}, "linkat": {unix.SYS_LINKAT, byPaths},
	"symlinkat": {unix.SYS_SYMLINKAT, byLink}, "unlinkat": {unix.SYS_UNLINKAT, byPath}, "mkdirat": {unix.SYS_MKDIRAT, byPath},
	"mknodat": {unix.SYS_MKNODAT, byPath}, "openat": {unix.SYS_OPENAT, byPath}, "openat2": {unix.SYS_OPENAT2, byPath},
	"readlinkat": {unix.SYS_READLINKAT, byPath}, "fchmodat": {unix.SYS_FCHMODAT, byPath}, "fchownat": {unix.SYS_FCHOWNAT, byPath},
	"utimensat": {unix.SYS_UTIMENSAT, byPath},
	"mount":     {unix.SYS_MOUNT, always}, "umount2": {unix.SYS_UMOUNT2, always}, "fsopen": {unix.SYS_FSOPEN, always},
	"fsconfig": {unix.SYS_FSCONFIG, always}, "fsmount": {unix.SYS_FSMOUNT, always}, "move_mount": {unix.SYS_MOVE_MOUNT, always},
	"open_tree": {unix.SYS_OPEN_TREE, always}, "mount_setattr": {unix.SYS_MOUNT_SETATTR, always},
}

// Fault says which call fails: the Nth call of that name, from 1, or every one if N is 0.
type Fault struct {
	Call  string
	N     int
	Error syscall.Errno
	// If, unless it is nil, reports by a call's process and arguments whether the call can fail.
	If func(pid uint32, args [6]uint64) bool
}

// LocksReadOnly is a Fault's If for flock(2). It reports whether NFS would refuse the call with EBADF: an exclusive lock of a file that is
// open for reading only. Locks of directories are not refused.
func LocksReadOnly(pid uint32, args [6]uint64) bool {
	var st unix.Stat_t
	fd := int32(args[0])
	if args[1]&unix.LOCK_EX == 0 || unix.Stat(fmt.Sprintf("/proc/%d/fd/%d", pid, fd), &st) != nil || st.Mode&unix.S_IFMT == unix.S_IFDIR {
		return false
	}
	info, _ := os.ReadFile(fmt.Sprintf("/proc/%d/fdinfo/%d", pid, fd))
	_, flags, _ := strings.Cut(string(info), "flags:")
	flags, _, _ = strings.Cut(strings.TrimSpace(flags), "\n")
	mode, err := strconv.ParseUint(flags, 8, 64)
	return err == nil && mode&unix.O_ACCMODE == unix.O_RDONLY
}

// Result is the outcome of a command.
type Result struct {
	Status int    // its exit status, -1 where a signal ended it
	Signal string // that signal
	Stuck  bool   // it was ended because it took too long
	Stdout []byte
	Stderr string
	Calls  map[string]int // how often each call was made
	Failed string         // the file that the failed call concerned; empty if no call failed
}

// helperEnv is set in the environment of a process of the test's binary that is to execute the command.
const helperEnv = "FAULTS_INJECT_HELPER"

// Main must be the first call of TestMain.
func Main() {
	if os.Getenv(helperEnv) != "" {
		fmt.Fprintln(os.Stderr, "inject:", become())
		os.Exit(122)
	}
}

// become installs the filter, sends its listener through descriptor 3, and executes the command in the arguments.
func become() error {
	os.Unsetenv(helperEnv)
	unix.CloseOnExec(3)
	path, err := exec.LookPath(os.Args[1])
	if err != nil {
		return err
	}
	program := []unix.SockFilter{{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: 0}} // the call's number
	for _, c := range calls {
		program = append(program,
			unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, Jf: 1, K: uint32(c.number)},
			unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_USER_NOTIF})
	}
	program = append(program, unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW})
	fprog := unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]}

	program0, err := unix.BytePtrFromString(path)
	if err != nil {
		return err
	}
	argv, err := syscall.SlicePtrFromStrings(os.Args[1:])
	if err != nil {
		return err
	}
	envv, err := syscall.SlicePtrFromStrings(os.Environ())
	if err != nil {
		return err
	}
	// The message with the listener is prepared before the filter is installed. After that, any call that Go's
	// scheduler makes in this thread may wait for the listener's owner, so only raw calls follow.
	oob := unix.UnixRights(0)
	data := byte(0)
	iov := unix.Iovec{Base: &data, Len: 1}
	msg := unix.Msghdr{Iov: &iov, Iovlen: 1, Control: &oob[0]}
	msg.SetControllen(len(oob))
	fd := (*int32)(unsafe.Pointer(&oob[unix.CmsgLen(0)]))

	runtime.LockOSThread() // the filter belongs to this thread, which must execute the command
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return err
	}
	listener, _, errno := unix.RawSyscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER,
		unix.SECCOMP_FILTER_FLAG_NEW_LISTENER|unix.SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV, uintptr(unsafe.Pointer(&fprog)))
	if errno != 0 {
		return fmt.Errorf("seccomp: %w", errno)
	}
	*fd = int32(listener)
	if _, _, errno = unix.RawSyscall(unix.SYS_SENDMSG, 3, uintptr(unsafe.Pointer(&msg)), 0); errno == 0 {
		_, _, errno = unix.RawSyscall(unix.SYS_EXECVE, uintptr(unsafe.Pointer(program0)), uintptr(unsafe.Pointer(&argv[0])), uintptr(unsafe.Pointer(&envv[0])))
	}
	runtime.KeepAlive(program)
	return errno
}

// Works reports whether the kernel supports this.
func Works() error {
	r, err := Run(exec.Command("true"), "/nowhere", Fault{}, time.Minute)
	if err == nil && r.Status != 0 {
		err = fmt.Errorf("status %d: %s", r.Status, r.Stderr)
	}
	return err
}

type notification struct {
	id         uint64
	pid, flags uint32
	number     int32
	arch       uint32
	ip         uint64
	args       [6]uint64
}

type response struct {
	id     uint64
	value  int64
	errno  int32
	follow uint32
}

// Run runs a command with the fault until it ends or the time is over. A fault without a name of a call changes
// nothing. Run counts the calls of the command itself, not of programs that it runs, on files in dir and on its
// standard output.
func Run(c *exec.Cmd, dir string, f Fault, limit time.Duration) (Result, error) {
	r := Result{Calls: map[string]int{}}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return r, err
	}
	defer unix.Close(pair[0])
	theirs := os.NewFile(uintptr(pair[1]), "listener")
	defer theirs.Close()

	self, err := os.Executable()
	if err != nil {
		return r, err
	}
	program := filepath.Base(c.Path)
	c.Args = append([]string{self, c.Path}, c.Args[1:]...)
	c.Path = self
	c.Env = append(slices.Clone(c.Env), helperEnv+"=1")
	c.ExtraFiles = []*os.File{theirs}
	c.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	c.WaitDelay = limit
	var out, errs bytes.Buffer
	c.Stdout, c.Stderr = &out, &errs
	if err := c.Start(); err != nil {
		return r, err
	}
	theirs.Close()
	timer := time.AfterFunc(limit, func() {
		r.Stuck = true
		_ = syscall.Kill(-c.Process.Pid, syscall.SIGKILL)
	})
	defer timer.Stop()
	listener, lerr := receive(pair[0])
	served := make(chan error, 1)
	if lerr == nil {
		s := server{listener: listener, program: program, dir: dir, fault: f, result: &r}
		go func() { served <- s.serve() }()
	}
	werr := c.Wait()
	timer.Stop()
	if lerr == nil {
		lerr = <-served
		unix.Close(listener)
	}
	r.Stdout, r.Stderr = out.Bytes(), errs.String()
	ws := c.ProcessState.Sys().(syscall.WaitStatus)
	r.Status = ws.ExitStatus()
	if ws.Signaled() {
		r.Signal = ws.Signal().String()
	}
	if lerr != nil {
		return r, fmt.Errorf("%w: %s", lerr, r.Stderr)
	}
	var exit *exec.ExitError
	if werr != nil && !errors.As(werr, &exit) {
		return r, werr
	}
	return r, nil
}

func receive(socket int) (int, error) {
	oob := make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := unix.Recvmsg(socket, make([]byte, 1), oob, unix.MSG_CMSG_CLOEXEC)
	if err != nil {
		return -1, err
	}
	messages, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil || len(messages) != 1 {
		return -1, errors.New("no listener")
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil {
		return -1, err
	}
	return fds[0], nil
}

type server struct {
	listener     int
	program, dir string
	fault        Fault
	result       *Result
}

// serve answers the kernel until no process has the filter.
func (s server) serve() error {
	names := map[int32]string{}
	for name, c := range calls {
		names[int32(c.number)] = name
	}
	for {
		fds := []unix.PollFd{{Fd: int32(s.listener), Events: unix.POLLIN}}
		_, err := unix.Poll(fds, -1)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return err
		}
		if fds[0].Revents&unix.POLLIN == 0 {
			return nil
		}
		var n notification
		if errno := ioctl(s.listener, unix.SECCOMP_IOCTL_NOTIF_RECV, unsafe.Pointer(&n)); errno == unix.ENOENT || errno == unix.EINTR {
			continue // the process was killed
		} else if errno != 0 {
			return errno
		}
		answer := response{id: n.id, follow: unix.SECCOMP_USER_NOTIF_FLAG_CONTINUE}
		name := names[n.number]
		if what, ok := s.concerned(n, calls[name].kind); ok {
			s.result.Calls[name]++
			if name == s.fault.Call && (s.fault.If == nil || s.fault.If(n.pid, n.args)) && (s.fault.N == 0 || s.result.Calls[name] == s.fault.N) {
				s.result.Failed = what
				answer = response{id: n.id, errno: -int32(s.fault.Error)}
			}
		}
		if errno := ioctl(s.listener, unix.SECCOMP_IOCTL_NOTIF_SEND, unsafe.Pointer(&answer)); errno != 0 && errno != unix.ENOENT {
			return errno
		}
	}
}

func ioctl(fd int, request uintptr, argument unsafe.Pointer) syscall.Errno {
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), request, uintptr(argument))
	return errno
}

// concerned returns the file that a call concerns, and whether the call counts.
func (s server) concerned(n notification, k kind) (string, bool) {
	proc := fmt.Sprintf("/proc/%d/", n.pid)
	if exe, err := os.Readlink(proc + "exe"); err != nil || filepath.Base(exe) != s.program {
		return "", false
	}
	descriptor := func(i int) string {
		if int32(n.args[i]) == unix.AT_FDCWD {
			at, _ := os.Readlink(proc + "cwd")
			return at
		}
		at, _ := os.Readlink(fmt.Sprintf("%sfd/%d", proc, int32(n.args[i])))
		return at
	}
	path := func(i int) string {
		if n.args[i+1] == 0 { // utimensat(2) with a descriptor
			return descriptor(i)
		}
		name := text(proc, n.args[i+1])
		if !filepath.IsAbs(name) {
			name = filepath.Join(descriptor(i), name)
		}
		return name
	}
	what := ""
	switch k {
	case byFD:
		what = descriptor(0)
		if n.number == unix.SYS_WRITE && n.args[0] == 1 {
			return "standard output", true
		}
	case byOut:
		what = descriptor(2)
	case byPath:
		what = path(0)
	case byPaths:
		what = path(2)
	case byLink:
		what = path(1)
	case always:
		return "a mount", true
	}
	return strings.TrimPrefix(what, s.dir+"/"), what == s.dir || strings.HasPrefix(what, s.dir+"/")
}

// text reads a C string from the memory of a process.
func text(proc string, at uint64) string {
	mem, err := os.Open(proc + "mem")
	if err != nil {
		return ""
	}
	defer mem.Close()
	b := make([]byte, unix.PathMax)
	n, _ := mem.ReadAt(b, int64(at))
	if n < len(b) { // the next page may be missing
		m, _ := mem.ReadAt(b[:4096-at%4096], int64(at))
		n = max(n, m)
	}
	s, _, _ := bytes.Cut(b[:n], []byte{0})
	return string(s)
}

// Names lists the names of the calls that can fail.
func Names() []string {
	var names []string
	for name := range calls {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}
