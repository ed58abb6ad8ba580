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

// Status is what a container does.
type Status string

// The statuses are runc's: a container that has never run, one whose process runs or is paused,
// and one whose process has ended. Creating is a container that is between the first two.
const (
	Created  Status = "created"
	Creating Status = "creating"
	Running  Status = "running"
	Paused   Status = "paused"
	Stopped  Status = "stopped"
)

// state is a state.json in the private state directory: the run of a container, or of a further process in one. It
// is there until everything of the run is gone from the host.
type state struct {
	Dir      string   `json:"dir"`      // in the store
	Identity identity `json:"identity"` // of Dir: another directory of that name has no part in the run

	Status       Status      `json:"status"` // Creating or Running
	HostProcess              // the zero value while Creating
	Started      time.Time   `json:"started,omitzero"`
	Runtime      string      `json:"runtime"`      // the program
	RuntimeState string      `json:"runtimeState"` // where it keeps its own
	Cgroups      []string    `json:"cgroups,omitempty"`
	Monitors     string      `json:"monitors,omitempty"` // as [placement] has it
	Session      uint64      `json:"session,omitempty"`  // of a further process, as the kernel numbers it
	Users        string      `json:"users,omitempty"`    // the file that tells which of the host's IDs it has
	Terminal     bool        `json:"terminal,omitempty"`
	Detached     bool        `json:"detached,omitempty"`
	Init         bool        `json:"init,omitempty"` // the process is an init of ours, see [state.awaitInit]
	Log          string      `json:"log,omitempty"`  // what its output goes to, see [Runtime.LogTo]; "" for its log
	Monitor      HostProcess `json:"monitor"`

	Interactive bool              `json:"interactive,omitempty"` // of a further process; of the container its record says it
	Pipes       map[string]string `json:"pipes,omitempty"`       // that it prints to: by stream, as /proc/PID/fd names them
}

// Exit is how a process ended.
type Exit struct {
	Status *int      `json:"status,omitempty"` // what it exited with, or 128+n for signal n; nil where nobody saw it
	Exited time.Time `json:"exited,omitzero"`
	Error  string    `json:"error,omitempty"` // what is known where the status is not

	OOMKilled bool `json:"oomKilled,omitempty"` // the kernel's OOM killer has killed a process of the container

	Started  time.Time `json:"started,omitzero"`
	Terminal bool      `json:"terminal,omitempty"`
	Detached bool      `json:"detached,omitempty"`
	Log      string    `json:"log,omitempty"` // what its output went to, if it was no log
}

// of adds what the end of a run keeps of the run.
func (e Exit) of(s state) Exit {
	e.Started, e.Terminal, e.Detached, e.Log = s.Started, s.Terminal, s.Detached, s.Log
	return e
}

// exitRoom is the size of an exit.json: it is made blank, so that a full disk has room for it.
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

// readState returns nil if nothing of a run of this very directory is left on the host.
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

// readPrivateState returns nil if there is no state.json in a private directory, or none that can be read: a killed
// process may have left that.
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

// blankExit makes exit.json anew, without contents: readers of the one before keep that.
func (p *Process) blankExit() error {
	b := bytes.Repeat([]byte{' '}, exitRoom)
	b[exitRoom-1] = '\n'
	return p.c.set.tree().Replace(p.file("exit.json"), b, 0o600, false)
}

// writeExit fills the room that was made.
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

// readExit returns nil while the end is not recorded. Blank is the file that is there then, since the run began.
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

// Info is a container as it is now.
type Info struct {
	Record
	Status   Status    `json:"status"`
	Pid      int       `json:"pid,omitempty"` // of the process, while there is one
	Started  time.Time `json:"started,omitzero"`
	Exit     *Exit     `json:"exit,omitempty"` // of the last run, once it has ended
	Terminal bool      `json:"terminal,omitempty"`
	Detached bool      `json:"detached,omitempty"`
	Dir      string    `json:"dir"`
	Root     string    `json:"bundle"` // of the OCI bundle
}

// Field gives the fields of the record, and status.
func (i Info) Field(path []string) (string, bool) {
	if len(path) == 1 && path[0] == "status" {
		return string(i.Status), true
	}
	return i.Record.Field(path)
}

// Info looks at the container: files count only as far as the kernel agrees.
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

// looked is what a look at a container's directory, or at that of a process in one, shows.
type looked struct {
	status    Status
	state     *state // nil unless something of a run is left on the host
	exit      *Exit
	monitored bool // somebody will record the end
}

// runs reports whether there is a process, which may be paused.
func (l looked) runs() bool { return l.status == Running || l.status == Paused }

// errLost is the error of an end that nobody saw.
const errLost = "its monitor was killed, and nobody saw the end"

// look returns NotFound where there is no container and no process, or no longer one.
func (p *Process) look() (looked, error) {
	for {
		// In this order: a run begins with state.json, then exit.json is made blank; it ends with exit.json
		// written, then state.json is removed.
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
				// The run that made it has ended since, or it was cut short by the end of a boot.
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
			l.status = Running // its end is being recorded
			return l, nil
		}
		// Nobody lives who would record the end; who did may have, and removed it all, since we looked.
		// In this order: while state.json is there, no exit.json was removed.
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
			return l, nil // its making was cut short
		default:
			l.status, l.exit = Stopped, &Exit{Error: errLost}
			return l, nil
		}
	}
}

// lost reports whether the end of the last run is not recorded, and nobody lives who would.
func (l looked) lost() bool {
	return l.status == Stopped && !l.monitored && l.exit.Error == errLost && l.exit.Exited.IsZero()
}

// described tells whether a directory is that of a container or of a process: what it is is written
// before anything else, and removed first.
func (p *Process) described() bool {
	for _, name := range []string{"container.json", "process.json"} {
		if _, err := p.c.set.tree().Stat(p.file(name)); err == nil {
			return true
		}
	}
	return false
}

// undescribe takes away what tells of a container or a process, in the order that [look] relies on. The
// rest of its directory may follow.
func (p *Process) undescribe() error {
	for _, name := range []string{"container.json", "process.json"} {
		if err := p.c.set.tree().Remove(p.file(name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// empty deletes all of the directory but its lock.
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

// removeEmptied removes the directory, which has nothing but the lock that this process holds. From then on another process
// may make a directory of that name.
func (p *Process) removeEmptied(lock *os.File) error {
	tree := p.c.set.tree()
	_ = tree.Remove(p.file("lock"))
	err := tree.RemoveDir(p.name)
	if errors.Is(err, unix.ENOTEMPTY) { // on NFS a removed file keeps a name in the directory until it is closed
		_ = lock.Close()
		err = tree.RemoveDir(p.name)
	}
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTEMPTY) { // the ID may have another owner by now
		return nil
	}
	return err
}

// removeDir removes the directory with what is in it.
func (p *Process) removeDir(lock *os.File) error {
	if err := p.empty(); err != nil {
		return err
	}
	return p.removeEmptied(lock)
}

// removeAll removes a directory in which others may just be making something.
func removeAll(tree disk.Tree, name string) error {
	for tries := 0; ; tries++ {
		err := tree.RemoveAll(name)
		if errors.Is(err, fs.ErrNotExist) { // nor what it was in
			return nil
		}
		if !errors.Is(err, unix.ENOTEMPTY) || tries == 100 {
			return err
		}
	}
}
