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

// Options say what the streams of a detached process are.
type Options struct {
	Dir         string // a private directory: its FIFO stdin leads to the process's input, its FIFO control to its monitor
	Log         Dir
	LogSize     int64 // see [NewWriter]
	NoLog       bool  // the output goes nowhere
	Output      int   // a descriptor that the output goes to, and not to the log; 0 for the log
	Terminal    bool
	Interactive bool // the process has an input
}

// Detached are the standard streams of a process that nobody waits for: what comes by a FIFO is its input, and its output goes
// to a log. The process itself has pipes: it could open a FIFO again, and criu could not restore one that is outside of the
// container.
type Detached struct {
	Ends
	Console *Console          // the process gets a terminal; nil if it gets none
	Pipes   map[string]string // what the kernel calls the pipes, by stream

	log     sink
	outputs map[string]*os.File // our ends, by stream
	input   *os.File            // the FIFO, open for reading and writing, so that the input goes on when a writer leaves
	feed    *os.File            // our end of the process's input, if that is a pipe
	control *os.File
	master  *os.File      // of the terminal
	eof     *latch        // closed when feed is to end once the FIFO is empty
	over    chan struct{} // closed when the process has ended
	ended   chan struct{} // has an element for each output that has ended
	n       int           // outputs that have not ended
}

// Open makes the streams of a process that is to run. The runtime sends a terminal to a socket with that path.
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
		// The process's end is open for reading, too, so that the process gets no SIGPIPE if the monitor dies.
		if fd, err = unix.Open(link(w), unix.O_RDWR|unix.O_CLOEXEC, 0); err != nil {
			return nil, err
		}
		_ = unix.Close(w)
		d.Ends[i] = os.NewFile(uintptr(fd), name)
		_ = unix.SetNonblock(r, true) // so that Go waits for it
		d.outputs[name] = os.NewFile(uintptr(r), name)
	}
	return d, nil
}

// Adopt opens the streams of a process whose monitor was killed. It calls find with the mode for each of the process's pipes;
// find returns nil if no process has that pipe open. A terminal is lost with the monitor that had it.
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

// open opens the log and the FIFOs.
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

// link is the path by which this process can open a descriptor's file again.
func link(fd int) string { return fmt.Sprintf("/proc/self/fd/%d", fd) }

// take takes the terminal's master.
func (d *Detached) take(f *os.File) error {
	if err := console.ClearONLCR(f.Fd()); err != nil {
		return err
	}
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	_ = f.Close()
	if err == nil {
		err = unix.SetNonblock(fd, true) // so that Go waits for it
	}
	if err != nil {
		return err
	}
	d.master = os.NewFile(uintptr(fd), "console")
	return nil
}

// Begin copies, once the process runs.
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

// pass moves what comes by the FIFO to the process's input, until the input is to end or no process reads it. No process can
// write to the FIFO then.
func (d *Detached) pass() {
	f := &flow{from: int(d.input.Fd()), to: int(d.feed.Fd()), stop: d.eof}
	_ = f.run()
	_ = d.input.Close()
	_ = d.feed.Close()
}

// copy writes an output to the log.
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
			// No process has the terminal open, but one may open it again.
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

// obey reads commands from the FIFO control.
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
			_, _ = d.master.Write([]byte{4}) // what ^D is on a terminal
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

// settling is how long the end of a process waits for its output.
const settling = 2 * time.Second

// Settle is called when the process has ended. It waits until the output was copied, but not for long: another process may have the
// pipe open for longer.
func (d *Detached) Settle() {
	close(d.over)
	d.drain(time.After(settling))
}

// Drain waits until no process has an output open.
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
