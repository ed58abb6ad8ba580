// Package network makes network namespaces that outlive the process that made them, and
// connects them by CNI plugins (https://www.cni.dev/docs/spec/), or by pasta for an ordinary user.
//
// A network is a directory below the state directory. Neither outlives a boot. What CNI or pasta is asked is written
// there before any program runs, so [Networks.Delete] removes whatever a killed process has left. A directory has:
//
//	lock             held by the process that works on the network
//	connection.json  what a container's record keeps, so that the network can be made again after a boot
//	request.json     what the plugins, or pasta, are asked
//	netns            the network namespace, mounted; the network's ports are taken while it is there
//	etc/             hosts, hostname and resolv.conf, in a file system of their own
//	cni/             the plugins' answers, for their removal
//	pasta.pid        the number of pasta's process
//	result.json      the network is connected
//
// Two more locks order what concerns several networks: networks.lock beside the directory, for ports and names, and
// bridge.lock in /run/distkit, for the host's bridge.
package network

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"distkit/disk"
	"distkit/errclass"
	"distkit/runtime"
	"distkit/runtime/spec"

	"github.com/containerd/errdefs"
	"github.com/containernetworking/cni/libcni"
	types "github.com/containernetworking/cni/pkg/types/100"
	"golang.org/x/sys/unix"
)

// ifName is the interface in the network's namespace.
const ifName = "eth0"

// Networks are the networks of a namespace of IDs.
type Networks struct {
	dir       string
	namespace string
	plugins   []string
}

// Open opens the networks below a state directory (see [runtime.DefaultState]). Plugins are the
// directories that have CNI's plugins.
func Open(state, namespace string, plugins []string) (*Networks, error) {
	if err := runtime.CheckID(namespace); err != nil {
		return nil, fmt.Errorf("namespace: %w", err)
	}
	state, err := filepath.Abs(state)
	if err != nil {
		return nil, fmt.Errorf("state directory: %w", err)
	}
	return &Networks{filepath.Join(state, "networks"), namespace, plugins}, nil
}

// Locate finds a network of this state directory by the path of its network namespace. It returns the networks of the
// same namespace of IDs, and the network's ID. A path elsewhere is InvalidArgument: what lies beside it is not trusted.
func (n *Networks) Locate(path string) (*Networks, string, error) {
	dir := filepath.Dir(path)
	namespace, id, has := strings.Cut(filepath.Base(dir), "+")
	if !has {
		namespace, id = "default", namespace
	}
	if filepath.Base(path) != "netns" || filepath.Dir(dir) != n.dir || runtime.CheckID(id) != nil {
		return nil, "", errclass.Errorf(errdefs.ErrInvalidArgument, "%q is no network's path in %s", path, n.dir)
	}
	of, err := Open(filepath.Dir(n.dir), namespace, n.plugins)
	return of, id, err
}

// Network is a network namespace that is connected.
type Network struct {
	ID        string        `json:"id"`
	Namespace string        `json:"namespace"`
	Path      string        `json:"path"` // of the network namespace
	Name      string        `json:"name"` // of CNI's configuration, or pasta
	Addresses []string      `json:"addresses"`
	Ports     []Port        `json:"ports,omitempty"`
	Result    *types.Result `json:"result"` // what CNI's plugins say, or the like
	// Files are those that a container finds names by, by their paths in it.
	Files map[string]string `json:"files"`
}

// request is what CNI is asked, as it stands in the network's directory.
type request struct {
	ID        string          `json:"id"`
	Namespace string          `json:"namespace"`
	Config    json.RawMessage `json:"config,omitempty"` // of CNI
	Pasta     *pasta          `json:"pasta,omitempty"`  // connects the network in CNI's place
	Ports     []Port          `json:"ports,omitempty"`
	Names     spec.Names      `json:"names"`
}

// place is a network's directory, locked.
type place struct {
	dir  string
	lock *os.File
}

func (p place) file(name string) string { return filepath.Join(p.dir, name) }

// files are those in a network's directory, in the order in which they are removed.
var files = []string{"connection.json", "connection.json.new", "result.json", "result.json.new", "request.json", "request.json.new", pastaPid, "lock"}

func (n *Networks) path(id string) (string, error) {
	key, err := runtime.Key(n.namespace, id)
	return filepath.Join(n.dir, key), err
}

// Paths returns where the network namespace of an ID's network is, or would be, and the files that a container finds names by,
// by their paths in it.
func (n *Networks) Paths(id string) (netns string, files map[string]string, err error) {
	dir, err := n.path(id)
	p := place{dir: dir}
	return p.file("netns"), p.nameFiles(), err
}

// open locks the directory of a network, and makes it if create is set. The error is NotFound if there is none, and
// Unavailable if another process works on it.
func (n *Networks) open(id string, create bool) (place, error) {
	dir, err := n.path(id)
	if err != nil {
		return place{}, err
	}
	for range 100 {
		if create {
			if err := runtime.PrivateDir(filepath.Dir(n.dir)); err != nil {
				return place{}, err
			}
			if err := runtime.PrivateDir(n.dir); err != nil {
				return place{}, err
			}
			if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
				return place{}, err
			}
		}
		flags := os.O_RDWR
		if create {
			flags |= os.O_CREATE
		}
		lock, err := os.OpenFile(filepath.Join(dir, "lock"), flags, 0o600)
		if errors.Is(err, fs.ErrNotExist) {
			if create {
				continue // its last owner has just removed the directory
			}
			if _, err := os.Lstat(dir); err == nil { // torn before there was a lock
				create = true
				continue
			}
			return place{}, errclass.Errorf(errdefs.ErrNotFound, "network %s: not found", id)
		}
		if err != nil {
			return place{}, err
		}
		err = disk.Lock(lock, unix.LOCK_EX|unix.LOCK_NB)
		if errors.Is(err, unix.EWOULDBLOCK) {
			err = fmt.Errorf("network %s: %w", id, disk.Busy(lock))
		}
		if err != nil {
			_ = lock.Close()
			return place{}, err
		}
		locked, err := lock.Stat()
		if now, serr := os.Lstat(lock.Name()); err == nil && serr == nil && os.SameFile(locked, now) {
			return place{dir, lock}, nil
		}
		_ = lock.Close()
	}
	return place{}, errclass.Errorf(errdefs.ErrUnavailable, "network %s: it is removed again and again", id)
}

// connector connects a network's namespace to other hosts.
type connector interface {
	check(ports []Port) error // before anything is made
	add(ctx context.Context, p place, r request) (*types.Result, error)
	del(ctx context.Context, p place, r request) error // also what an add that failed, or was killed, has done
}

func (n *Networks) connector(r request) (connector, error) {
	if r.Pasta != nil {
		return r.Pasta, nil
	}
	config, err := libcni.NetworkConfFromBytes(r.Config)
	return &cni{n, config}, err
}

// Add makes a network: its namespace, connected as the configuration says, with the ports and names that w has. The error is
// AlreadyExists if the ID has a network, NotImplemented if a plugin isn't installed, and Unavailable if a port is taken. Add first
// removes what a killed process has left of a network with this ID. If it fails, nothing is left.
func (n *Networks) Add(ctx context.Context, id string, w Wanted) (_ *Network, err error) {
	wanted := request{ID: id, Namespace: n.namespace, Pasta: w.pasta, Ports: w.ports, Names: w.connection.Names}
	if w.config != nil {
		wanted.Config = w.config.Bytes
	}
	if wanted.Names.Hostname == "" {
		wanted.Names.Hostname = id
	}
	by, err := n.connector(wanted)
	if err == nil {
		err = by.check(wanted.Ports)
	}
	if err != nil {
		return nil, err
	}
	p, err := n.open(id, true)
	if err != nil {
		return nil, err
	}
	defer p.lock.Close()
	if _, err := os.Lstat(p.file("result.json")); err == nil {
		return nil, errclass.Errorf(errdefs.ErrAlreadyExists, "network %s: already exists", id)
	}
	r, err := p.request()
	if err == nil {
		err = n.disconnect(ctx, p, r)
	} else if errdefs.IsNotFound(err) {
		err = nil
	}
	if err != nil {
		return nil, fmt.Errorf("network %s: remove what was left of it: %w", id, err)
	}
	err = p.write("request.json", wanted)
	if err == nil {
		err = p.write("connection.json", w.connection)
	}
	if err != nil {
		return nil, fmt.Errorf("network %s: %w", id, err)
	}
	return n.connect(ctx, p, wanted, by, p.remove)
}

// connect makes a network's namespace and connects it. If that fails, the connection is taken back, and undone undoes the rest.
func (n *Networks) connect(ctx context.Context, p place, r request, by connector, undone func() error) (_ *Network, err error) {
	if err := n.reserve(ctx, p, r); err != nil {
		_ = errors.Join(unmountAll(p.file("netns")), undone())
		return nil, fmt.Errorf("network %s: %w", r.ID, err)
	}
	defer func() {
		if err == nil {
			return
		}
		err = fmt.Errorf("network %s: %w", r.ID, err)
		// The programs that have run take back what they did, also where ctx is done.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 30*time.Second)
		defer cancel()
		if derr := n.disconnect(ctx, p, r); derr == nil {
			_ = undone()
		}
	}()
	release, err := using(ctx, r)
	if err != nil {
		return nil, err
	}
	defer release()
	result, err := by.add(ctx, p, r)
	if err != nil {
		return nil, err
	}
	if err := p.writeNames(r, result); err != nil {
		return nil, err
	}
	net := r.network(p, result)
	lock, err := n.lockAll(ctx)
	if err != nil {
		return nil, err
	}
	defer lock.Close()
	if err := forwardPublished(ctx, net); err != nil {
		return nil, err
	}
	if err := p.write("result.json", result); err != nil {
		return nil, err
	}
	return net, n.announce(p, r)
}

// Down disconnects a network and removes its namespace, but keeps what was asked for it, for [Networks.Up].
// If there is no such network, that is success.
func (n *Networks) Down(ctx context.Context, id string) error {
	p, err := n.open(id, false)
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	defer p.lock.Close()
	r, err := p.request()
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err == nil {
		err = n.disconnect(ctx, p, r)
	}
	if err != nil {
		return fmt.Errorf("network %s: %w", id, err)
	}
	return nil
}

// Up connects a network that is down, as it was asked for; its addresses may be others. A network that is up stays as
// it is. The error is NotFound if there is no such network.
func (n *Networks) Up(ctx context.Context, id string) (*Network, error) {
	p, err := n.open(id, false)
	if err != nil {
		return nil, err
	}
	defer p.lock.Close()
	r, err := p.request()
	if err != nil {
		return nil, fmt.Errorf("network %s: %w", id, err)
	}
	if net, ok := p.connected(r); ok {
		return net, nil
	}
	by, err := n.connector(r)
	if err == nil {
		err = by.check(r.Ports)
	}
	if err == nil { // what a killed process has begun
		err = n.disconnect(ctx, p, r)
	}
	if err != nil {
		return nil, fmt.Errorf("network %s: %w", id, err)
	}
	return n.connect(ctx, p, r, by, func() error { return nil })
}

// connected reads a network that is connected.
func (p place) connected(r request) (*Network, bool) {
	var result types.Result
	b, err := os.ReadFile(p.file("result.json"))
	if err != nil || json.Unmarshal(b, &result) != nil {
		return nil, false
	}
	return r.network(p, &result), true
}

// Delete disconnects a network and removes it. If there is no such network, that is success.
func (n *Networks) Delete(ctx context.Context, id string) error {
	p, err := n.open(id, false)
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	defer p.lock.Close()
	r, err := p.request()
	if err == nil {
		err = n.disconnect(ctx, p, r)
	}
	if err == nil || errdefs.IsNotFound(err) {
		err = p.remove()
	}
	if err != nil {
		return fmt.Errorf("network %s: %w", id, err)
	}
	return nil
}

// List returns the connected networks of this namespace, sorted by ID.
func (n *Networks) List(ctx context.Context) ([]*Network, error) {
	entries, err := os.ReadDir(n.dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("list networks: %w", err)
	}
	var all []*Network
	for _, e := range entries {
		p := place{dir: filepath.Join(n.dir, e.Name())}
		r, err := p.request()
		if err != nil || r.Namespace != n.namespace {
			continue
		}
		if net, ok := p.connected(r); ok {
			all = append(all, net)
		}
	}
	slices.SortFunc(all, func(a, b *Network) int { return strings.Compare(a.ID, b.ID) })
	return all, ctx.Err()
}

// disconnect makes the network one that is not connected: it has taken back what connected it, as far as that came, and
// removes the namespace and the names. What only the last network leaves on the host goes with it.
func (n *Networks) disconnect(ctx context.Context, p place, r request) error {
	by, err := n.connector(r)
	if err != nil {
		return err
	}
	if err := n.unannounce(ctx, p, r); err != nil {
		return err
	}
	err = func() error {
		release, err := using(ctx, r)
		if err != nil {
			return err
		}
		defer release()
		if err := by.del(ctx, p, r); err != nil {
			return err
		}
		return errors.Join(unmountAll(p.file("netns")), unmountAll(p.file(namesDir)))
	}()
	if err == nil {
		tidy(ctx, r)
	}
	return err
}

// unannounce marks the network as one that is not connected, and takes its name away from the others.
func (n *Networks) unannounce(ctx context.Context, p place, r request) error {
	lock, err := n.lockAll(ctx)
	if err != nil {
		return err
	}
	defer lock.Close()
	if err := os.Remove(p.file("result.json")); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return n.announce(p, r)
}

// cni connects a network by CNI's plugins.
type cni struct {
	n      *Networks
	config *libcni.NetworkConfigList
}

func (c *cni) check(ports []Port) error { return c.n.check(c.config, ports) }

func (c *cni) add(ctx context.Context, p place, r request) (*types.Result, error) {
	if err := c.n.sweepLeases(ctx, p, r, c.config); err != nil {
		return nil, err
	}
	got, err := c.n.cni(p).AddNetworkList(ctx, c.config, r.runtimeConf(p))
	if err != nil {
		return nil, pluginError(ctx, err)
	}
	return types.GetResult(got)
}

func (c *cni) del(ctx context.Context, p place, r request) error {
	if err := c.n.cni(p).DelNetworkList(ctx, c.config, r.runtimeConf(p)); err != nil {
		return pluginError(ctx, err)
	}
	return nil
}

func (n *Networks) cni(p place) *libcni.CNIConfig {
	return libcni.NewCNIConfigWithCacheDir(n.plugins, p.file("cni"), nil)
}

func (r request) runtimeConf(p place) *libcni.RuntimeConf {
	// An ID never has two separators in a row, so this is one for each network of the host.
	c := &libcni.RuntimeConf{ContainerID: r.Namespace + "--" + r.ID, NetNS: p.file("netns"), IfName: ifName}
	if len(r.Ports) > 0 {
		c.CapabilityArgs = map[string]any{"portMappings": r.Ports}
	}
	return c
}

func (r request) network(p place, result *types.Result) *Network {
	net := &Network{ID: r.ID, Namespace: r.Namespace, Path: p.file("netns"), Name: r.name(), Addresses: []string{}, Ports: r.Ports,
		Result: result, Files: p.nameFiles()}
	for _, ip := range result.IPs {
		net.Addresses = append(net.Addresses, ip.Address.String())
	}
	return net
}

// name returns the name of CNI's configuration, or [Pasta].
func (r request) name() string {
	if r.Pasta != nil {
		return Pasta
	}
	var config struct {
		Name string `json:"name"`
	}
	_ = json.Unmarshal(r.Config, &config) // CNI checked it
	return config.Name
}

// reaches reports whether the network and another one reach each other, and find each other's names: they are connected to the same one,
// in the same namespace of IDs. Each pasta connects one network alone.
func (r request) reaches(other request) bool {
	return other.Namespace == r.Namespace && r.Pasta == nil && other.Pasta == nil && other.name() == r.name()
}

// onBridge reports whether the network is on the host's bridge that [Bridge] is.
func (r request) onBridge() bool { return r.name() == bridgeName }

// request reads what CNI was asked. The error is NotFound if a killed process has not written it yet.
func (p place) request() (r request, err error) {
	b, err := os.ReadFile(p.file("request.json"))
	if errors.Is(err, fs.ErrNotExist) {
		return r, errclass.As(err, errdefs.ErrNotFound)
	}
	if err == nil {
		err = json.Unmarshal(b, &r)
	}
	return r, err
}

// write replaces a file atomically. Nothing is synced, since nothing outlives a boot.
func (p place) write(name string, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	if err := os.WriteFile(p.file(name+".new"), append(b, '\n'), 0o600); err != nil {
		return err
	}
	return os.Rename(p.file(name+".new"), p.file(name))
}

// remove removes the directory, the lock last.
func (p place) remove() error {
	if err := errors.Join(unmountAll(p.file("netns")), unmountAll(p.file(namesDir))); err != nil {
		return err
	}
	if err := os.RemoveAll(p.file("cni")); err != nil {
		return err
	}
	for _, name := range files {
		if err := os.Remove(p.file(name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return os.Remove(p.dir)
}

// pluginError returns a plugin's error in one line.
func pluginError(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return errors.New(strings.Join(strings.Fields(err.Error()), " "))
}
