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

// state is a state.json: the last run of a container, or of a further process in one.
type state struct {
	Status       Status    `json:"status"` // Creating or Running
	Process                // the zero value while Creating
	Started      time.Time `json:"started,omitzero"`
	Runtime      string    `json:"runtime"`      // the program
	RuntimeState string    `json:"runtimeState"` // where it keeps its own
	Cgroups      []string  `json:"cgroups,omitempty"`
	Terminal     bool      `json:"terminal,omitempty"`
	Detached     bool      `json:"detached,omitempty"`
	Monitor      Process   `json:"monitor"`

	Interactive bool              `json:"interactive,omitempty"` // of a further process; of the container its record says it
	Pipes       map[string]string `json:"pipes,omitempty"`       // that it prints to: by stream, as /proc/PID/fd names them
}

// Exit is how a process ended.
type Exit struct {
	Status *int      `json:"status,omitempty"` // what it exited with, or 128+n for signal n; nil where nobody saw it
	Exited time.Time `json:"exited,omitzero"`
	Error  string    `json:"error,omitempty"` // what is known where the status is not
}

// exitRoom is the size of an exit.json: it is made blank, so that a full disk has room for it.
const exitRoom = 512

func writeState(dir string, s state) error {
	b, err := json.Marshal(s)
	if err != nil {
		return err
	}
	return disk.Replace(filepath.Join(dir, "state.json"), append(b, '\n'), 0o600, false)
}

// readState returns nil where there is none, or none that can be read: a killed process or a
// power failure may have left that.
func readState(dir string) (*state, error) {
	b, err := readBounded(filepath.Join(dir, "state.json"))
	if errors.Is(err, fs.ErrNotExist) {
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
func blankExit(dir string) error {
	name := filepath.Join(dir, "exit.json")
	b := bytes.Repeat([]byte{' '}, exitRoom)
	b[exitRoom-1] = '\n'
	return disk.Replace(name, b, 0o600, false)
}

// writeExit fills the room that was made.
func writeExit(dir string, e Exit) error {
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
	f, err := os.OpenFile(filepath.Join(dir, "exit.json"), os.O_WRONLY|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(room, 0)
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	return err
}

// readExit returns nil while the end is not recorded.
func readExit(dir string) (*Exit, error) {
	b, err := readBounded(filepath.Join(dir, "exit.json"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return parseExit(b), nil
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
	l, err := look(c.dir)
	if err != nil {
		return i, fmt.Errorf("container %s: %w", c.ID, err)
	}
	i.Status, i.Exit = l.status, l.exit
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
	state     *state // nil before the first run
	exit      *Exit
	monitored bool // somebody will record the end
}

// errLost is the error of an end that nobody saw.
const errLost = "its monitor was killed, and nobody saw the end"

// look returns NotFound where there is no container and no process, or no longer one.
func look(dir string) (looked, error) {
	for {
		// In this order: who ends a run writes exit.json while state.json is there, and who removes
		// one removes state.json first.
		s, err := readState(dir)
		if err != nil {
			return looked{}, err
		}
		e, err := readExit(dir)
		if err != nil {
			return looked{}, err
		}
		l := looked{status: Created, state: s, exit: e}
		if s == nil {
			l.exit = nil
			if e != nil && e.Status != nil {
				l.status, l.exit = Stopped, e
			} else if e == nil && !described(dir) {
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
		if e, err = readExit(dir); err != nil {
			return looked{}, err
		}
		now, err := readState(dir)
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

// described tells whether a directory is that of a container or of a process: what it is is written
// before anything else, and removed first.
func described(dir string) bool {
	for _, name := range []string{"container.json", "process.json"} {
		if _, err := os.Lstat(filepath.Join(dir, name)); err == nil {
			return true
		}
	}
	return false
}

// undescribe takes away what tells of a container or a process, in the order that [look] relies on. The
// rest of its directory may follow.
func undescribe(dir string) error {
	for _, name := range []string{"container.json", "process.json", "state.json"} {
		if err := os.Remove(filepath.Join(dir, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// removeAll removes a directory in which others may just be making something.
func removeAll(dir string) error {
	for tries := 0; ; tries++ {
		err := os.RemoveAll(dir)
		if !errors.Is(err, unix.ENOTEMPTY) || tries == 100 {
			return err
		}
	}
}
