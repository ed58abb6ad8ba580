// Package runtime runs OCI bundles with an OCI runtime (runc or crun), without a daemon. Package
// [distkit/runtime/spec] makes a bundle's configuration from an image's.
//
// # Processes
//
// A [Container] is a record of what it uses, and a [Process], its own. [Container.Exec] starts further ones in it. All are
// kept alike: a directory in the store (containers/NS/ID, exec/X below it) for what outlives the host, and a private
// directory on this host (STATE/run/KEY, exec-X below it) for what dies with the boot. Nothing in the store names a process,
// cgroup, program or pipe of this host, because the store may be a stranger's.
//
//	        begin             start                 end
//	created ─────▶ creating ──────▶ running ──────────────▶ stopped
//	   ▲              │              │   ▲                     │
//	   │   abandon    │        pause ▼   │ resume              │ begin: the next run
//	   └──────────────┘             paused                     ▼
//	                                                        creating
//
// No file holds this status. [Process.look] derives it from two files and from the kernel, which knows who lives:
//
//	state.json (host)   exit.json (store)   its process   its monitor   status
//	none                none                -             -             created
//	none                an end              -             -             stopped
//	none                blank               -             -             stopped; the end was lost with the boot
//	any                 an end              -             -             stopped; the next run begins, or the last is cleaned up
//	creating            none, blank         -             alive         creating
//	creating            none, blank         -             dead          created; what was made is cleared
//	running             blank               alive         -             running, or paused if its cgroup is frozen
//	running             blank               dead          alive         running; the end is being recorded
//	running             blank               dead          dead          stopped; nobody saw the end
//
// # Who writes what, in which order
//
//	step      by          writes
//	create    the caller  the directory and its lock, container.json (process.json of a further process), config.json
//	begin     the caller  state.json: creating; exit.json: blank, of full size, so that a full disk has room for the end;
//	                      network, mount, STATE/run/KEY/bundle and mounts; state.json: the cgroups, before anything runs in them
//	start     the monitor state.json: its own identity; then, by the runtime, the process; state.json: running
//	end       the monitor exit.json: the end, before anything that can fail; then removes the runtime's state and the
//	                      cgroups, unmounts, disconnects, and removes STATE/run/KEY, and STATE/lock/KEY last
//	remove    the caller  removes network and snapshot, then container.json, then the rest of the directory, its lock last
//
// A process that is killed between two steps leaves files from which the next call goes on: [Containers.Clear] removes what
// nobody looks after, and records that the end was not seen. Which containers it has to look at is in STATE/run and
// STATE/due. Tests kill at each step, see at.
//
// # Locks
//
// All are flock(2), which the kernel releases when the last process that shares one has ended.
//
//	lock                      of           held by                                      for
//	containers/NS/ID/lock     the process  who runs or removes it, with shim and guard  the whole run
//	STATE/lock/KEY            the ID       the same; KEY is unique on the host          the whole run
//	STATE/run/KEY/working     the runtime  each runtime process, which inherits it      its work
//	container.json            the record   who changes it                               an instant
//
// They are taken in this order. A further process has a lock and a working of its own in its directories.
//
// # Monitors
//
// The monitor is whoever will record the end. In the foreground that is the calling program: it is a supervisor's child,
// so what it started ends with it. A guard, which does nothing but wait for the end of a pipe, kills that if the monitor is
// killed. In the background the monitor is a shim, which keeps the process's streams. A process whose shim was killed is
// adopted, never killed: the next call that works on it starts another shim, which knows the process by its number and
// time of start, and finds its pipes by what the kernel calls them.
// A database does not stop because of the death of a process that it does not need, and `task start` on it would otherwise
// be what kills it. What adoption can't bring back is told: a terminal is gone with its shim, and kernels before
// 6.15 tell an exit status to the parent alone, so that the end may be recorded without one.
package runtime
