package stdio

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/console"
	"golang.org/x/sys/unix"
)

// Options describe the streams of a detached process.
type Options struct {
	Dir         string // a private directory with two FIFOs: stdin for the process's input, control for commands to its monitor
	Log         Dir
	LogSize     int64 // see NewWriter
	NoLog       bool  // discard the output
	Output      int   // descriptor that gets the output instead of the log; 0 for the log
	Terminal    bool
	Interactive bool // the process has an input
}

// Detached are the standard streams of a process that nobody waits for. Its input comes by a FIFO, and its output goes
// to a log. The process itself gets pipes: it could reopen a FIFO, and criu could not restore a FIFO outside of the
// container.
type Detached struct {
	Ends
	Console *Console          // receives the process's terminal; nil if it has none
	Pipes   map[string]string // the kernel's names of the process's pipes, by stream

	log     sink
	outputs map[string]*os.File // our ends, by stream
	input   *os.File            // the FIFO, opened read-write, so that a writer that leaves does not end the input
	feed    *os.File            // our end of the process's input pipe, nil for a terminal
	control *os.File
	master  *os.File      // of the terminal
	eof     *latch        // closed when the input is to end once the FIFO is empty
	over    chan struct{} // closed when the process has ended
	ended   chan struct{} // gets a value for each output that has ended
	n       int           // number of outputs that have not ended
}

// Open makes the streams for a process that will be started. The runtime sends the terminal, if any, to a socket at the
// path socket.
func (o Options) Open(socket string) (d *Detached, err error) {
	for _, name := range []string{"stdin", "control"} {
		name = filepath.Join(o.Dir, name)
		if err := os.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
		if err := unix.Mkfifo(name, 0o600); err != nil {
			return nil, &fs.PathError{Op: "mkfifo", Path: name, Err: err}
		}
	}
	if d, err = o.open(); err != nil {
		return nil, err
	}
	d.log.Begin()
	if o.Terminal {
		d.Console, err = listen(socket, d.take)
		return d, err
	}
	if !o.Interactive {
		if d.Ends[0], err = os.Open(os.DevNull); err != nil {
			return nil, err
		}
	}
	for i, name := range []string{"stdin", "stdout", "stderr"} {
		if d.Ends[i] != nil {
			continue
		}
		r, w, err := newPipe()
		if err != nil {
			return nil, err
		}
		fd := w
		if i == 0 {
			fd = r
		}
		if d.Pipes[name], err = os.Readlink(link(fd)); err != nil {
			return nil, err
		}
		if i == 0 {
			d.Ends[0], d.feed = os.NewFile(uintptr(r), name), os.NewFile(uintptr(w), name)
			continue
		}
		// The process's end is opened read-write, so that it gets no SIGPIPE if the monitor dies.
		if fd, err = unix.Open(link(w), unix.O_RDWR|unix.O_CLOEXEC, 0); err != nil {
			return nil, err
		}
		_ = unix.Close(w)
		d.Ends[i] = os.NewFile(uintptr(fd), name)
		_ = unix.SetNonblock(r, true) // non-blocking, so that Go's poller waits for it
		d.outputs[name] = os.NewFile(uintptr(r), name)
	}
	return d, nil
}

// Adopt opens the streams of a process whose monitor was killed. It calls find for each of the process's pipes, with
// the mode in which to open it. find returns nil if no process has that pipe open. The terminal of a process is lost
// together with its monitor.
func (o Options) Adopt(pipes map[string]string, find func(pipe string, mode int) (*os.File, error)) (*Detached, error) {
	d, err := o.open()
	if err != nil {
		return nil, err
	}
	for name, pipe := range pipes {
		if name == "stdin" {
			d.feed, err = find(pipe, unix.O_WRONLY)
		} else {
			d.outputs[name], err = find(pipe, unix.O_RDONLY)
		}
		if err != nil {
			return nil, err
		}
	}
	return d, nil
}

// open opens the log and makes the FIFOs.
func (o Options) open() (d *Detached, err error) {
	d = &Detached{Pipes: map[string]string{}, outputs: map[string]*os.File{}, over: make(chan struct{}), ended: make(chan struct{}, 2)}
	switch {
	case o.NoLog:
		d.log = nowhere{}
	case o.Output != 0:
		d.log = newForward(o.Output)
	default:
		if d.log, err = NewWriter(o.Log, o.LogSize); err != nil {
			return nil, err
		}
	}
	if d.eof, err = newLatch(); err != nil {
		return nil, err
	}
	if d.control, err = os.OpenFile(o.Dir+"/control", os.O_RDWR|unix.O_NONBLOCK, 0); err != nil {
		return nil, err
	}
	if o.Terminal || o.Interactive {
		d.input, err = os.OpenFile(o.Dir+"/stdin", os.O_RDWR|unix.O_NONBLOCK, 0)
	}
	return d, err
}

// link returns the path by which this process can reopen a descriptor's file.
func link(fd int) string { return fmt.Sprintf("/proc/self/fd/%d", fd) }

// take receives the terminal's master.
func (d *Detached) take(f *os.File) error {
	if err := console.ClearONLCR(f.Fd()); err != nil {
		return err
	}
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	_ = f.Close()
	if err == nil {
		err = unix.SetNonblock(fd, true) // non-blocking, so that Go's poller waits for it
	}
	if err != nil {
		return err
	}
	d.master = os.NewFile(uintptr(fd), "console")
	return nil
}

// Begin starts copying. It is called when the process runs.
func (d *Detached) Begin() {
	d.Console.Close()
	d.Ends.close()
	if d.master != nil {
		d.outputs["stdout"] = d.master
		go func() {
			_, _ = io.CopyBuffer(struct{ io.Writer }{d.master}, struct{ io.Reader }{d.input}, make([]byte, 4096))
		}()
	}
	if d.feed != nil {
		go d.pass()
	}
	for stream, f := range d.outputs {
		if f != nil {
			d.n++
			go d.copy(stream, f)
		}
	}
	go d.obey()
}

// pass moves input from the FIFO to the process until the input is to end or no process reads it. After that no process
// can write to the FIFO.
func (d *Detached) pass() {
	f := &flow{from: int(d.input.Fd()), to: int(d.feed.Fd()), stop: d.eof}
	_ = f.run()
	_ = d.input.Close()
	_ = d.feed.Close()
}

// copy copies an output to the log.
func (d *Detached) copy(stream string, f *os.File) {
	defer func() { d.ended <- struct{}{} }()
	b := make([]byte, pieceRoom)
	for {
		n, err := f.Read(b)
		if n > 0 {
			d.log.Write(stream, b[:n])
		}
		switch {
		case err == nil:
		case d.master != nil && errors.Is(err, unix.EIO):
			// No process has the terminal open now, but one may reopen it.
			select {
			case <-d.over:
				return
			case <-time.After(50 * time.Millisecond):
			}
		default:
			return
		}
	}
}

// obey carries out commands from the FIFO control.
func (d *Detached) obey() {
	lines := bufio.NewReaderSize(d.control, 256)
	for {
		line, err := lines.ReadSlice('\n')
		if err != nil && !errors.Is(err, bufio.ErrBufferFull) {
			return
		}
		switch words := strings.Fields(string(line)); {
		case len(words) == 3 && words[0] == "resize":
			d.resize(words[1], words[2])
		case len(words) == 1 && words[0] == "eof" && d.master != nil:
			_, _ = d.master.Write([]byte{4}) // ^D is how the input ends on a terminal
		case len(words) == 1 && words[0] == "eof":
			d.eof.close()
		}
	}
}

func (d *Detached) resize(columns, rows string) {
	c, cerr := strconv.ParseUint(columns, 10, 16)
	r, rerr := strconv.ParseUint(rows, 10, 16)
	if d.master == nil || cerr != nil || rerr != nil {
		return
	}
	if raw, err := d.master.SyscallConn(); err == nil {
		_ = raw.Control(func(fd uintptr) {
			_ = unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, &unix.Winsize{Col: uint16(c), Row: uint16(r)})
		})
	}
}

// settling is how long Settle waits.
const settling = 2 * time.Second

// Settle is called when the process has ended. It waits until the output is copied, but only for a moment: another
// process may keep the pipe open for long.
func (d *Detached) Settle() {
	close(d.over)
	d.drain(time.After(settling))
}

// Drain waits until no process has an output open any more.
func (d *Detached) Drain() { d.drain(nil) }

func (d *Detached) drain(end <-chan time.Time) {
	for d.n > 0 {
		select {
		case <-d.ended:
			d.n--
		case <-end:
			return
		}
	}
}

// Close closes the log.
func (d *Detached) Close() { d.log.Close() }
