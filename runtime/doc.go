// Package runtime runs OCI bundles with an OCI runtime (runc or crun), without a daemon. Package
// [distkit/runtime/spec] makes a bundle's configuration from an image's.
//
// # Processes
//
// [Open] returns the [Containers] of a namespace of a store. A [Container] has a [Record] of what it uses and its own
// [Process]; [Container.Exec] starts further processes in it. [Container.Run] runs a container in the foreground, and
// [Container.Start] detached.
//
// Every process has two directories. The one in the store (containers/NS/ID, or exec/X below it) has what survives a
// boot. The private one on this host (STATE/run/KEY, or exec-X below it) has the state of a run. Nothing in the store
// names a process, cgroup, program or pipe of this host, because the store may have been written by a stranger.
//
//	        begin             start                 end
//	created ─────▶ creating ──────▶ running ──────────────▶ stopped
//	   ▲              │              │   ▲                     │
//	   │   abandon    │        pause ▼   │ resume              │ begin: the next run
//	   └──────────────┘             paused                     ▼
//	                                                        creating
//
// No file holds the status. [Process.look] derives it from two files, and from the kernel, which knows what is alive:
//
//	state.json (host)   exit.json (store)   its process   its monitor   status
//	none                none                -             -             created
//	none                an end              -             -             stopped
//	none                blank               -             -             stopped; the end was lost with the boot
//	any                 an end              -             -             stopped; a run is about to begin, or is being cleaned up
//	creating            none, blank         -             alive         creating
//	creating            none, blank         -             dead          created; what was made must be cleared up
//	running             blank               alive         -             running, or paused if its cgroup is frozen
//	running             blank               dead          alive         running; the end is being recorded
//	running             blank               dead          dead          stopped; nobody saw the end
//
// # Who writes what, and in which order
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
// If a process is killed between two steps, the next call continues from the files that are there: [Containers.Clear]
// removes what has no monitor, and records that the end was not seen. STATE/run and STATE/due list the containers that
// it has to check. Crash tests kill the process at each step: see the variable atStep.
//
// # Locks
//
// All locks are flock(2). The kernel releases a lock when the last process that shares it has exited.
//
//	lock                      of           held by                                      for
//	containers/NS/ID/lock     the process  its caller, shim and guard, or its remover   the whole run
//	STATE/lock/KEY            the ID       the same; KEY is unique on the host          the whole run
//	STATE/run/KEY/working     the runtime  each runtime process, which inherits it      its work
//	container.json            the record   the process that changes it                  an instant
//
// They are taken in this order. A further process has its own lock and working in its directories.
//
// # Monitors
//
// The monitor of a process is the process that will record its end. In the foreground it is the calling program, which
// belongs to a supervisor, so what it started must end with it. Therefore a guard, a process that only waits for the end
// of a pipe, kills the container if the monitor is killed.
//
// A detached process has a shim as its monitor, which also keeps its streams. If the shim is killed, the process is
// adopted, not killed: a database must not stop because a process died that it does not need. The next call that works
// on it starts another shim. That knows the process by its number and time of start, and finds its pipes by the kernel's
// names for them. Two things can't be recovered, and are reported: a terminal is lost with its shim, and kernels before
// 6.15 report an exit status only to the parent, so the end may be recorded without a status.
//
// # Errors
//
// The classes are NotFound, AlreadyExists, InvalidArgument, FailedPrecondition (it runs, does not run, or is not this
// user's), Unavailable (another process works on it), PermissionDenied and NotImplemented. [ExitStatus] gives docker's
// statuses 125 to 127 for an error of a run.
package runtime
