//! The calls for streams, events and graphs.

use std::ffi::{c_int, c_uint};
use std::sync::Arc;

use super::device::Device;
use super::registry::Handle;
use super::status::{Out, Status, answer, put};
use super::stream::{EVENTS, Event, GRAPHS, Graph, Kind, STREAMS, Stream};

/// `CU_STREAM_NON_BLOCKING`.
const NON_BLOCKING: c_uint = 1;

#[unsafe(no_mangle)]
extern "C" fn cuStreamCreate(stream: Out<'_, Handle>, flags: c_uint) -> Status {
    answer(Device::current().and_then(|device| {
        let kind = if flags & NON_BLOCKING != 0 {
            Kind::NonBlocking
        } else {
            Kind::Blocking
        };
        put(stream, STREAMS.enter(Stream::start(device, kind)))
    }))
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamDestroy_v2(stream: Handle) -> Status {
    answer(STREAMS.remove(stream).map(|stream| stream.close()))
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamSynchronize(stream: Handle) -> Status {
    answer(Stream::of(stream).and_then(|stream| stream.synchronize()))
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamQuery(stream: Handle) -> Status {
    answer(
        Stream::of(stream).and_then(|stream| match stream.end().is_passed() {
            true => Ok(()),
            false => Err(Status::NOT_READY),
        }),
    )
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamWaitEvent(stream: Handle, event: Handle, _flags: c_uint) -> Status {
    answer(Stream::of(stream).and_then(|stream| EVENTS.get(event)?.delay(&stream)))
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamIsCapturing(stream: Handle, state: Out<'_, c_int>) -> Status {
    answer(Stream::of(stream).and_then(|stream| put(state, c_int::from(stream.is_capturing()))))
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamBeginCapture_v2(stream: Handle, _mode: c_int) -> Status {
    answer(Stream::of(stream).and_then(|stream| stream.begin_capture()))
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamEndCapture(stream: Handle, graph: Out<'_, Handle>) -> Status {
    answer(Stream::of(stream).and_then(|stream| {
        let works = stream.end_capture()?;
        put(
            graph,
            GRAPHS.enter(Arc::new(Graph::new(stream.device(), works))),
        )
    }))
}

#[unsafe(no_mangle)]
extern "C" fn cuGraphInstantiateWithFlags(
    executable: Out<'_, Handle>,
    graph: Handle,
    _flags: u64,
) -> Status {
    answer(
        GRAPHS
            .get(graph)
            .and_then(|graph| put(executable, GRAPHS.enter(graph))),
    )
}

#[unsafe(no_mangle)]
extern "C" fn cuGraphLaunch(executable: Handle, stream: Handle) -> Status {
    answer(Stream::of(stream).and_then(|stream| GRAPHS.get(executable)?.launch(&stream)))
}

#[unsafe(no_mangle)]
extern "C" fn cuGraphDestroy(graph: Handle) -> Status {
    answer(GRAPHS.remove(graph).map(|_| ()))
}

#[unsafe(no_mangle)]
extern "C" fn cuGraphExecDestroy(executable: Handle) -> Status {
    cuGraphDestroy(executable)
}

#[unsafe(no_mangle)]
extern "C" fn cuEventCreate(event: Out<'_, Handle>, _flags: c_uint) -> Status {
    answer(Device::current().and_then(|_| put(event, EVENTS.enter(Arc::new(Event::default())))))
}

#[unsafe(no_mangle)]
extern "C" fn cuEventDestroy_v2(event: Handle) -> Status {
    answer(EVENTS.remove(event).map(|_| ()))
}

#[unsafe(no_mangle)]
extern "C" fn cuEventRecord(event: Handle, stream: Handle) -> Status {
    answer(Stream::of(stream).and_then(|stream| {
        EVENTS.get(event)?.record(&stream);
        Ok(())
    }))
}

#[unsafe(no_mangle)]
extern "C" fn cuEventSynchronize(event: Handle) -> Status {
    answer(EVENTS.get(event).and_then(|event| match event.place()? {
        None => Ok(()),
        Some(place) => {
            place.wait();
            place.device().check()
        }
    }))
}

#[unsafe(no_mangle)]
extern "C" fn cuEventQuery(event: Handle) -> Status {
    answer(EVENTS.get(event).and_then(|event| match event.place()? {
        Some(place) if !place.is_passed() => Err(Status::NOT_READY),
        Some(place) => place.device().check(),
        None => Ok(()),
    }))
}

#[unsafe(no_mangle)]
extern "C" fn cuEventElapsedTime_v2(
    milliseconds: Out<'_, f32>,
    start: Handle,
    end: Handle,
) -> Status {
    answer(
        EVENTS
            .get(start)
            .and_then(|start| put(milliseconds, start.until(&*EVENTS.get(end)?)?)),
    )
}

#[unsafe(no_mangle)]
extern "C" fn cuEventElapsedTime(milliseconds: Out<'_, f32>, start: Handle, end: Handle) -> Status {
    cuEventElapsedTime_v2(milliseconds, start, end)
}
