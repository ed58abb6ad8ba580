package runtime

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"distkit/disk"

	"golang.org/x/sys/unix"
)

// Status is the status of a container.
type Status string

// The statuses are runc's. A container is created until its first run, running or paused while its process exists, and
// stopped after that. It is creating while a run begins.
const (
	Created  Status = "created"
	Creating Status = "creating"
	Running  Status = "running"
	Paused   Status = "paused"
	Stopped  Status = "stopped"
)

// state is the content of state.json in the private state directory, about a run of a container or of a further
// process. It exists until everything of the run has been removed from the host.
type state struct {
	Dir      string   `json:"dir"`      // directory in the store
	Identity identity `json:"identity"` // identity of Dir, so that another directory of that name is not taken for it

	Status       Status      `json:"status"` // Creating or Running
	HostProcess              // zero while Creating
	Started      time.Time   `json:"started,omitzero"`
	Runtime      string      `json:"runtime"`      // the runtime's program
	RuntimeState string      `json:"runtimeState"` // the directory for its own state
	Cgroups      []string    `json:"cgroups,omitempty"`
	Monitors     string      `json:"monitors,omitempty"` // see placement
	Session      uint64      `json:"session,omitempty"`  // of a further process: its session, by the kernel's number
	Users        string      `json:"users,omitempty"`    // the file that records the IDs it has of the host's
	Terminal     bool        `json:"terminal,omitempty"`
	Detached     bool        `json:"detached,omitempty"`
	Init         bool        `json:"init,omitempty"` // the process is our init: see awaitInit
	Log          string      `json:"log,omitempty"`  // where its output goes: see Runtime.LogTo; "" for its log
	Monitor      HostProcess `json:"monitor"`

	Interactive bool              `json:"interactive,omitempty"` // of a further process; for a container see its record
	Pipes       map[string]string `json:"pipes,omitempty"`       // pipes for its output by stream, named as in /proc/PID/fd
}

// Exit describes how a process ended.
type Exit struct {
	Status *int      `json:"status,omitempty"` // exit status, or 128+n for signal n; nil if nobody saw it
	Exited time.Time `json:"exited,omitzero"`
	Error  string    `json:"error,omitempty"` // what is known if Status is nil

	OOMKilled bool `json:"oomKilled,omitempty"` // the OOM killer has killed a process of the container

	Started  time.Time `json:"started,omitzero"`
	Terminal bool      `json:"terminal,omitempty"`
	Detached bool      `json:"detached,omitempty"`
	Log      string    `json:"log,omitempty"` // where its output went, if not to a log
}

// of adds the data of the run that are kept after its end.
func (e Exit) of(s state) Exit {
	e.Started, e.Terminal, e.Detached, e.Log = s.Started, s.Terminal, s.Detached, s.Log
	return e
}

// exitRoom is the size of exit.json. The file is written blank when a run begins, so that there is room for the end
// even if the disk is full later.
const exitRoom = 512

func (p *Process) writeState(s state) (err error) {
	s.Dir = p.dir()
	if s.Identity, err = identify(s.Dir); err != nil {
		return err
	}
	b, err := json.Marshal(s)
	if err != nil {
		return err
	}
	return disk.Replace(filepath.Join(p.private, "state.json"), append(b, '\n'), 0o600, false)
}

// readState returns the state of a run of this directory, or nil if nothing of one is left on the host.
func (p *Process) readState() (*state, error) {
	switch err := privateState(p.c.set.state); {
	case errors.Is(err, fs.ErrNotExist):
		return nil, nil
	case err != nil:
		return nil, err
	}
	s, err := readPrivateState(p.private)
	if s == nil || err != nil {
		return nil, err
	}
	if id, err := identify(p.dir()); err != nil || id != s.Identity {
		return nil, nil //nolint:nilerr // the directory is gone
	}
	return s, nil
}

// readPrivateState reads state.json in a private directory. It returns nil if there is none, or if it is unreadable, as
// a killed process may leave it.
func readPrivateState(private string) (*state, error) {
	b, err := os.ReadFile(filepath.Join(private, "state.json"))
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var s state
	if json.Unmarshal(b, &s) != nil || s.Status != Creating && s.Status != Running {
		return nil, nil
	}
	return &s, nil
}

// blankExit makes a new, blank exit.json. Readers that have the old file open keep that.
func (p *Process) blankExit() error {
	b := bytes.Repeat([]byte{' '}, exitRoom)
	b[exitRoom-1] = '\n'
	return p.c.set.tree().Replace(p.file("exit.json"), b, 0o600, false)
}

// writeExit writes the end into the blank file.
func (p *Process) writeExit(e Exit) error {
	b, err := json.Marshal(e)
	if err != nil || len(b) >= exitRoom {
		e.Error = fmt.Sprintf("%.200s", e.Error)
		if b, err = json.Marshal(e); err != nil {
			return err
		}
	}
	room := bytes.Repeat([]byte{' '}, max(exitRoom, len(b)+1))
	copy(room, b)
	room[len(room)-1] = '\n'
	f, err := p.c.set.tree().OpenFile(p.file("exit.json"), os.O_WRONLY|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(room, 0)
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	return err
}

// readExit returns the recorded end, or nil if there is none. blank is the file's information if the file is blank, as
// it is from the beginning of a run to its end.
func (p *Process) readExit() (e *Exit, blank fs.FileInfo, err error) {
	f, err := p.c.set.tree().Open(p.file("exit.json"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil, nil
	}
	if err != nil {
		return nil, nil, err
	}
	defer f.Close()
	b, err := disk.ReadAll(f, maxFile)
	if err != nil {
		return nil, nil, err
	}
	if e = parseExit(b); e == nil {
		blank, err = f.Stat()
	}
	return e, blank, err
}

func parseExit(b []byte) *Exit {
	b = bytes.TrimSpace(bytes.TrimRight(b, "\x00 \n"))
	var e Exit
	if len(b) == 0 || json.Unmarshal(b, &e) != nil {
		return nil
	}
	return &e
}

// Info is a container with its current status.
type Info struct {
	Record
	Status   Status    `json:"status"`
	Pid      int       `json:"pid,omitempty"` // of the process, while it exists
	Started  time.Time `json:"started,omitzero"`
	Exit     *Exit     `json:"exit,omitempty"` // end of the last run, if it has ended
	Terminal bool      `json:"terminal,omitempty"`
	Detached bool      `json:"detached,omitempty"`
	Dir      string    `json:"dir"`
	Root     string    `json:"bundle"` // directory of the OCI bundle
}

// Field returns the fields of the record, and status.
func (i Info) Field(path []string) (string, bool) {
	if len(path) == 1 && path[0] == "status" {
		return string(i.Status), true
	}
	return i.Record.Field(path)
}

// Info returns the container's current status. Files count only as far as the kernel confirms them.
func (c *Container) Info() (Info, error) {
	i := Info{Record: c.Record, Dir: c.dir, Root: c.BundleDir()}
	l, err := c.proc("").look()
	if err != nil {
		return i, fmt.Errorf("container %s: %w", c.ID, err)
	}
	i.Status, i.Exit = l.status, l.exit
	if l.exit != nil {
		i.Started, i.Terminal, i.Detached = l.exit.Started, l.exit.Terminal, l.exit.Detached
	}
	if l.state != nil {
		i.Started, i.Terminal, i.Detached = l.state.Started, l.state.Terminal, l.state.Detached
		if l.status == Running || l.status == Paused {
			i.Pid = l.state.Pid
		}
	}
	return i, nil
}

// looked is the result of a look at the files of a container or a further process.
type looked struct {
	status    Status
	state     *state // nil unless something of a run is left on the host
	exit      *Exit
	monitored bool // a monitor lives, and will record the end
}

// runs reports whether the process exists; it may be paused.
func (l looked) runs() bool { return l.status == Running || l.status == Paused }

// errLost is the Exit.Error of an end that nobody saw.
const errLost = "its monitor was killed, and nobody saw the end"

// look determines the status from the files and the kernel. NotFound: there is no such container or process.
func (p *Process) look() (looked, error) {
	for {
		// The order matters: a run begins by writing state.json, and then makes exit.json blank; it ends by writing
		// exit.json, and then removes state.json.
		s, err := p.readState()
		if err != nil {
			return looked{}, err
		}
		e, blank, err := p.readExit()
		if err != nil {
			return looked{}, err
		}
		l := looked{status: Created, state: s, exit: e}
		if s == nil {
			switch {
			case e != nil:
				l.status = Stopped
			case blank != nil:
				// The run that made the file blank has ended since, or a boot has cut it short.
				again, err := p.readState()
				if err != nil {
					return looked{}, err
				}
				_, now, err := p.readExit()
				if err != nil {
					return looked{}, err
				}
				if again != nil || now == nil || !os.SameFile(blank, now) {
					continue
				}
				l.status, l.exit = Stopped, &Exit{Error: errLost}
			case !p.described():
				return looked{}, notFound("it was removed")
			}
			return l, nil
		}
		l.monitored = s.Monitor.Alive()
		switch {
		case e != nil:
			l.status = Stopped
			return l, nil
		case s.Status == Creating && l.monitored:
			l.status = Creating
			return l, nil
		case s.Status == Running && s.Alive():
			l.status = Running
			if frozen(s.Cgroups) {
				l.status = Paused
			}
			return l, nil
		case l.monitored:
			l.status = Running // the monitor is recording its end
			return l, nil
		}
		// No monitor lives. But since we looked, it may have recorded the end and removed everything, so read again.
		// The order matters: as long as state.json exists, exit.json has not been removed.
		if e, _, err = p.readExit(); err != nil {
			return looked{}, err
		}
		now, err := p.readState()
		if err != nil {
			return looked{}, err
		}
		switch {
		case now == nil || now.Status != s.Status || now.Monitor != s.Monitor:
		case e != nil:
			l.status, l.exit = Stopped, e
			return l, nil
		case s.Status == Creating:
			return l, nil // the start was cut short
		default:
			l.status, l.exit = Stopped, &Exit{Error: errLost}
			return l, nil
		}
	}
}

// lost reports whether the end of the last run is not recorded, and no monitor lives to record it.
func (l looked) lost() bool {
	return l.status == Stopped && !l.monitored && l.exit.Error == errLost && l.exit.Exited.IsZero()
}

// described reports whether the directory is one of a container or a process. The file that describes it is written
// first and removed first.
func (p *Process) described() bool {
	for _, name := range []string{"container.json", "process.json"} {
		if _, err := p.c.set.tree().Stat(p.file(name)); err == nil {
			return true
		}
	}
	return false
}

// undescribe removes the files that describe a container or a process, in the order that [look] relies on. Afterwards
// the rest of the directory can be removed.
func (p *Process) undescribe() error {
	for _, name := range []string{"container.json", "process.json"} {
		if err := p.c.set.tree().Remove(p.file(name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// empty deletes the contents of the directory except its lock.
func (p *Process) empty() error {
	if err := p.undescribe(); err != nil {
		return err
	}
	tree := p.c.set.tree()
	dir, err := tree.OpenDir(p.name)
	if err != nil {
		return err
	}
	defer dir.Close()
	entries, err := dir.ReadDir(-1)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.Name() == "lock" {
			continue
		}
		if err := removeAll(tree, p.file(e.Name())); err != nil {
			return err
		}
	}
	return nil
}

// removeEmptied removes the directory, which contains only the lock that the caller holds. After that, another process
// may make a directory of the same name.
func (p *Process) removeEmptied(lock *os.File) error {
	tree := p.c.set.tree()
	_ = tree.Remove(p.file("lock"))
	err := tree.RemoveDir(p.name)
	if errors.Is(err, unix.ENOTEMPTY) { // on NFS a removed file that is open keeps a name in the directory
		_ = lock.Close()
		err = tree.RemoveDir(p.name)
	}
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTEMPTY) { // the ID may have a new owner already
		return nil
	}
	return err
}

// removeDir removes the directory with its contents.
func (p *Process) removeDir(lock *os.File) error {
	if err := p.empty(); err != nil {
		return err
	}
	return p.removeEmptied(lock)
}

// removeAll removes a directory, even if other processes are making files in it.
func removeAll(tree disk.Tree, name string) error {
	for tries := 0; ; tries++ {
		err := tree.RemoveAll(name)
		if errors.Is(err, fs.ErrNotExist) { // nor does its parent exist
			return nil
		}
		if !errors.Is(err, unix.ENOTEMPTY) || tries == 100 {
			return err
		}
	}
}
