// Package containers is what the commands that run containers share: their flags, and the snapshots and networks that
// package runtime does not know. [Flags.Open] opens a store's containers with [Snapshots] as root filesystems and with
// networks made by run-net.
package containers

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"distkit/cmd/internal/cli"
	"distkit/cmd/internal/sibling"
	"distkit/disk"
	"distkit/runtime"
	"distkit/runtime/spec"
	"distkit/snapshot"
	"distkit/snapshot/drivers"

	"github.com/containerd/errdefs"
	"github.com/spf13/pflag"
)

// Flags are the flags that select containers.
type Flags struct{ root, namespace, state *string }

// NewFlags registers --root, --namespace and --state.
func NewFlags(f *pflag.FlagSet) *Flags {
	return &Flags{
		root: cli.Root(f), namespace: cli.Namespace(f),
		state: f.String("state", "", "the private `DIR` for what runs (env DIST_STATE) (default: /run/distkit, or the user's runtime directory)"),
	}
}

// Open opens the containers.
func (o *Flags) Open() (*runtime.Containers, error) { return Open(*o.root, *o.namespace, o.State()) }

// State returns the private directory for the state of runs.
func (o *Flags) State() string {
	if *o.state != "" {
		return *o.state
	}
	if dir := os.Getenv("DIST_STATE"); dir != "" {
		return dir
	}
	return runtime.DefaultState()
}

// Namespace returns the namespace of containers and image names.
func (o *Flags) Namespace() string { return *o.namespace }

// Root returns the store's directory.
func (o *Flags) Root() string { return *o.root }

// Snapshots returns the snapshots of the containers.
func (o *Flags) Snapshots() Snapshots { return Snapshots{*o.root, *o.namespace} }

// Open opens the containers of a namespace of a store, with the store's snapshots.
func Open(root, namespace, state string) (*runtime.Containers, error) {
	return runtime.Open(root, namespace, state, Snapshots{root, namespace}, networks{state})
}

// Runtime are the flags for the runtime.
type Runtime struct {
	name, cgroupParent, log *string
	of                      *Flags
}

// RuntimeFlags registers --runtime, --cgroup-parent and --log.
func RuntimeFlags(f *pflag.FlagSet, of *Flags) *Runtime {
	return &Runtime{
		f.String("runtime", "", "the OCI runtime's `NAME` or path (default: runc, else crun)"),
		f.String("cgroup-parent", "", "the host's cgroup `DIR` below which the container's is (default: the caller's own; /distkit for a detached container)"),
		f.String("log", "", "where a detached container's output goes: none, or `fd:N` for the open descriptor N (default: its log)"),
		of,
	}
}

// Name returns the value of --runtime.
func (o *Runtime) Name() string { return *o.name }

// CheckDetached returns an error if --log is given for a container in the foreground, which has no log.
func (o *Runtime) CheckDetached(detached bool) error {
	if *o.log != "" && !detached {
		return cli.Usagef("--log goes with a container in the background")
	}
	return nil
}

// Find finds the runtime: that of --runtime, or else the container's, or else any.
func (o *Runtime) Find(wanted string) (*runtime.Runtime, error) {
	name := *o.name
	if name == "" {
		name = wanted
	}
	r, err := runtime.Find(name, o.of.State())
	if err == nil {
		err = r.CgroupParent(*o.cgroupParent)
	}
	if err == nil {
		err = r.LogTo(*o.log)
	}
	return r, err
}

// InheritStdio registers --inherit-stdio.
func InheritStdio(f *pflag.FlagSet) *bool {
	return f.Bool("inherit-stdio", false, "give the process this command's own standard streams instead of pipes")
}

// Streams returns the streams for a process in the foreground.
func Streams(inherit bool) runtime.Streams {
	if inherit {
		return runtime.Inherited
	}
	return runtime.Piped
}

// NewRecord are the flags --rm, --interactive, --label and --log-size of a new container.
type NewRecord struct {
	runtime.Record
	labels  *[]string
	logSize *string
}

// Record registers these flags.
func Record(f *pflag.FlagSet) *NewRecord {
	r := &NewRecord{
		labels:  f.StringArray("label", nil, "label the container `KEY=VALUE` (can be repeated)"),
		logSize: f.String("log-size", "", "the `SIZE` at which a detached process's log is put aside (default: 16MiB)"),
	}
	f.BoolVar(&r.RemoveAtEnd, "rm", false, "remove the container at its end")
	f.BoolVarP(&r.Interactive, "interactive", "i", false, "give a detached process an input for task attach")
	return r
}

// Get returns a record with the flags' values.
func (r *NewRecord) Get() (rec runtime.Record, err error) {
	rec = r.Record
	if rec.Labels, err = cli.Labels(*r.labels); err != nil {
		return rec, err
	}
	if *r.logSize != "" {
		rec.LogSize, err = spec.ParseSize(*r.logSize)
	}
	return rec, err
}

// Snapshots implements [runtime.Snapshots] for a namespace.
type Snapshots struct{ root, namespace string }

func (s Snapshots) open(ctx context.Context, driver string) (*snapshot.Snapshotter, error) {
	return drivers.OpenRecorded(ctx, s.root, driver, snapshot.Options{Namespace: s.namespace})
}

// Stat returns the description of a snapshot. NotFound: there is no such snapshot.
func (s Snapshots) Stat(ctx context.Context, what runtime.Snapshot) (snapshot.Info, error) {
	sn, err := s.open(ctx, what.Driver)
	if err != nil {
		return snapshot.Info{}, err
	}
	return sn.Stat(ctx, what.Key)
}

func (s Snapshots) Prepare(ctx context.Context, what runtime.Snapshot, parent, target string) error {
	sn, err := s.open(ctx, what.Driver)
	if err != nil {
		return err
	}
	if _, err := sn.Prepare(ctx, what.Key, parent, nil); err != nil {
		return err
	}
	// A container may need set-user-ID programs. Nobody else can reach the target.
	if err := sn.MountWith(ctx, what.Key, target, snapshot.MountOptions{}); err != nil {
		return errors.Join(err, sn.Remove(context.WithoutCancel(ctx), what.Key))
	}
	return nil
}

func (s Snapshots) Mount(ctx context.Context, what runtime.Snapshot, target string) error {
	sn, err := s.open(ctx, what.Driver)
	if err != nil {
		return err
	}
	return sn.MountWith(ctx, what.Key, target, snapshot.MountOptions{})
}

func (s Snapshots) MountFor(ctx context.Context, what runtime.Snapshot, target string, users *os.File) error {
	sn, err := s.open(ctx, what.Driver)
	if err != nil {
		return err
	}
	return sn.MountWith(ctx, what.Key, target, snapshot.MountOptions{Users: users})
}

func (s Snapshots) Unmount(target string) error {
	if err := snapshot.Unmount(target); !errdefs.IsNotFound(err) {
		return err
	}
	return nil
}

func (s Snapshots) Remove(ctx context.Context, what runtime.Snapshot) error {
	sn, err := s.open(ctx, what.Driver)
	if err == nil {
		err = sn.Remove(ctx, what.Key)
	}
	if !errdefs.IsNotFound(err) {
		return err
	}
	return nil
}

// PlanNetwork runs run-net plan, which checks a request for a network and makes nothing. It copies run-net's warnings
// to warnings.
func (o *Flags) PlanNetwork(ctx context.Context, id string, c runtime.Connection, warnings io.Writer) (*runtime.NetworkPlan, error) {
	flags := append(networkFlags(c), "--namespace="+*o.namespace)
	out, warned, err := networks{o.State()}.runNet(ctx, "plan", id, flags...)
	if err != nil {
		return nil, err
	}
	p := &runtime.NetworkPlan{}
	if err := json.Unmarshal(out, p); err != nil {
		return nil, fmt.Errorf("run-net plan: %w", err)
	}
	_, err = warnings.Write(warned)
	return p, err
}

// NetworkFiles returns the files that resolve names, by their paths in a container, if run-net has made the network
// namespace at path; else nil.
func (o *Flags) NetworkFiles(path string) map[string]string {
	state, err := filepath.Abs(o.State())
	dir := filepath.Join(filepath.Dir(path), "etc")
	if err != nil || filepath.Dir(filepath.Dir(path)) != filepath.Join(state, "networks") {
		return nil
	}
	files := map[string]string{}
	for _, name := range spec.NameFiles {
		files[name] = filepath.Join(dir, filepath.Base(name))
		if _, err := os.Stat(files[name]); err != nil {
			return nil
		}
	}
	return files
}

// networkFlags returns run-net's flags for a network.
func networkFlags(c runtime.Connection) []string {
	flags := []string{"--network=" + c.Name}
	if c.ConfDir != "" {
		flags = append(flags, "--conf-dir="+c.ConfDir)
	}
	if c.Hostname != "" {
		flags = append(flags, "--hostname="+c.Hostname)
	}
	for _, list := range []struct {
		flag   string
		values []string
	}{{"publish", c.Ports}, {"add-host", c.Hosts}, {"dns", c.Servers}, {"dns-search", c.Search}, {"dns-option", c.Options}} {
		for _, v := range list.values {
			flags = append(flags, "--"+list.flag+"="+v)
		}
	}
	return flags
}

// networks implements [runtime.Networks] by calling run-net, so that commands need not link CNI.
type networks struct{ state string }

func (n networks) Up(ctx context.Context, path string, c *runtime.Connection) error {
	// A first run finds its network up: run-net's file says so, and no process is needed.
	if _, err := os.Stat(filepath.Join(filepath.Dir(path), "result.json")); err == nil {
		return nil
	}
	var flags []string
	if c != nil {
		flags = networkFlags(*c)
	}
	return n.change(ctx, "up", path, flags...)
}

// Connection reads the request that run-net keeps beside the network's namespace.
func (n networks) Connection(path string) (*runtime.Connection, error) {
	b, err := disk.Tree(filepath.Dir(path)).ReadFile("connection.json", 1<<20)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	c := &runtime.Connection{}
	return c, json.Unmarshal(b, c)
}

func (n networks) Down(ctx context.Context, path string) error { return n.change(ctx, "down", path) }

func (n networks) Remove(ctx context.Context, path string) error {
	// The directory has all that run-net keeps of the network. Without it there is no network.
	if _, err := os.Stat(filepath.Dir(path)); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return n.change(ctx, "del", path)
}

func (n networks) change(ctx context.Context, verb, path string, flags ...string) error {
	_, _, err := n.runNet(ctx, verb, path, flags...)
	return err
}

// runNet runs run-net, and returns its standard output and standard error. If it fails, err has its message.
func (n networks) runNet(ctx context.Context, verb, object string, flags ...string) (out, errs []byte, err error) {
	return sibling.Run(ctx, nil, "run-net", slices.Concat([]string{verb, "--state=" + n.state}, flags, []string{"--", object})...)
}

// Below calls f with a directory that shows the parent of a snapshot while f runs. The directory is "" if there is no
// parent.
func (s Snapshots) Below(ctx context.Context, what runtime.Snapshot, f func(dir string) error) (err error) {
	sn, err := s.open(ctx, what.Driver)
	if err != nil {
		return err
	}
	i, err := sn.Stat(ctx, what.Key)
	if err != nil {
		return err
	}
	if i.Parent == "" {
		return f("")
	}
	dir, err := os.MkdirTemp("", "distkit-below-")
	if err != nil {
		return err
	}
	key := "below-" + runtime.NewID()
	if _, err := sn.View(ctx, key, i.Parent, nil); err != nil {
		_ = os.Remove(dir)
		return err
	}
	defer func() {
		err = errors.Join(err, snapshot.Unmount(dir), sn.Remove(context.WithoutCancel(ctx), key), os.Remove(dir))
	}()
	if err := sn.Mount(ctx, key, dir); err != nil {
		return err
	}
	return f(dir)
}

// Ended returns the error for a command that ran a process: the process's status, or the failure to run it. The runtime
// may have reported that already.
func Ended(status int, err error) error {
	switch {
	case err != nil && runtime.Told(err):
		return cli.Exit(runtime.ExitStatus(err))
	case errdefs.IsNotImplemented(err): // criu does not work here
		return err
	case err != nil:
		return cli.ExitWith(runtime.ExitStatus(err), err)
	case status != 0:
		return cli.Exit(status)
	}
	return nil
}
